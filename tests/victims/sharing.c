/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Processes that share memory, open files, directories or signal actions without being threads of one process, as
 * clone(2) makes them, in all combinations that the kernel allows. What one changes the other must see if they share
 * it, and must not if they do not; either way round.
 *
 * Those that share memory share the thread pointer, too: in them is nothing but system calls.
 */
#include "victim.h"

#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define STACK (64 << 10)

static const struct {
    int flags, exit_signal;
} kinds[] = {
    {0, SIGCHLD},
    {CLONE_VM, SIGCHLD},
    {CLONE_FILES, SIGCHLD},
    {CLONE_FS, SIGCHLD},
    {CLONE_FILES | CLONE_FS, SIGCHLD},
    {CLONE_VM | CLONE_FILES, SIGCHLD},
    {CLONE_VM | CLONE_FS, SIGWINCH},
    {CLONE_VM | CLONE_SIGHAND, SIGCHLD},
    {CLONE_VM | CLONE_SIGHAND | CLONE_FS, SIGCHLD},
    {CLONE_VM | CLONE_SIGHAND | CLONE_FILES, SIGCHLD},
    {CLONE_VM | CLONE_FILES | CLONE_FS, 0},
    {CLONE_VM | CLONE_SIGHAND | CLONE_FILES | CLONE_FS, SIGCHLD},
};
#define KINDS (sizeof kinds / sizeof *kinds)

enum order {NONE, CHANGE, LOOK, LEAVE};
/* what a child is asked, and what it answers; shared by all of them, whatever else they share */
static struct desk {
    uint32_t order, answer;
    int seen, serial;
} *desks;
static pid_t children[KINDS];
static char stacks[KINDS][STACK] __attribute__((aligned(16)));
static volatile int cell;       /* in private memory */

static long futex(uint32_t *word, int operation, uint32_t value)
{
    return syscall(SYS_futex, word, operation, value, NULL, NULL, 0);
}

static void await(uint32_t *word, uint32_t not_this)
{
    while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == not_this)
        futex(word, FUTEX_WAIT, not_this);
}

static void post(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    futex(word, FUTEX_WAKE, INT_MAX);
}

/* struct kernel_sigaction; the C library's sigaction(3) would do, but for its restorer in shared memory */
static void *action(void *set)
{
    struct {
        void *handler;
        unsigned long flags, restorer;
        uint64_t mask;
    } old = {0}, new = {set};

    syscall(SYS_rt_sigaction, SIGUSR1, set == SIG_ERR ? NULL : &new, &old, sizeof old.mask);
    return old.handler;
}

/* Something of each kind, another for each serial number. */
static void change(int serial)
{
    char name[16] = {'d', (char)('0' + serial / 10), (char)('0' + serial % 10)};

    cell = serial;
    syscall(SYS_umask, 0100 + serial);
    syscall(SYS_chdir, "..");
    syscall(SYS_chdir, name);
    syscall(SYS_dup2, 0, 100 + serial);
    action(serial % 2 ? SIG_IGN : SIG_DFL);
}

/* The CLONE_* of what is as `change(serial)` leaves it. */
static int look(int serial)
{
    long mask = syscall(SYS_umask, 0);
    struct stat here, there;
    char name[20] = {'.', '.', '/', 'd', (char)('0' + serial / 10), (char)('0' + serial % 10)};
    int seen = cell == serial ? CLONE_VM : 0;

    syscall(SYS_umask, mask);
    if (syscall(SYS_stat, ".", &here) == 0 && syscall(SYS_stat, name, &there) == 0 && here.st_ino == there.st_ino
        && mask == 0100 + serial)
        seen |= CLONE_FS;
    if (syscall(SYS_fcntl, 100 + serial, F_GETFD) >= 0)
        seen |= CLONE_FILES;
    if (action(SIG_ERR) == (serial % 2 ? (void *)SIG_IGN : (void *)SIG_DFL))
        seen |= CLONE_SIGHAND;
    return seen;
}

static int live(void *argument)
{
    struct desk *desk = argument;

    if (!(kinds[desk - desks].flags & CLONE_FILES))
        not_the_one_to_report();
    for (await(&desk->order, NONE); desk->order != LEAVE; await(&desk->order, NONE)) {
        if (desk->order == CHANGE)
            change(desk->serial);
        else
            desk->seen = look(desk->serial);
        __atomic_store_n(&desk->order, NONE, __ATOMIC_RELEASE);
        post(&desk->answer, 1);
    }
    syscall(SYS_exit_group, 40 + (int)(desk - desks));
    return 0;
}

static void ask(struct desk *desk, enum order order, int serial)
{
    desk->serial = serial;
    desk->answer = 0;
    post(&desk->order, order);
    await(&desk->answer, 0);
}

static void check_child(int number)
{
    struct desk *desk = &desks[number];
    int flags = kinds[number].flags, serial = 2 * number + 2, seen;

    change(serial);         /* an even one: the next one is seen in the action, too */
    ask(desk, CHANGE, serial + 1);
    seen = look(serial + 1);
    CHECK(seen == flags, "child %d: its changes are seen in %#x, not %#x", number, (unsigned)seen, (unsigned)flags);
    change(serial);
    ask(desk, LOOK, serial);
    /* whoever does not share memory, files or action still has its own of the step before */
    CHECK(desk->seen == flags, "child %d: sees changes in %#x, not %#x", number, (unsigned)desk->seen, (unsigned)flags);
}

int main(void)
{
    int status;

    desks = mmap(NULL, sizeof *desks * KINDS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(desks != MAP_FAILED, "mmap");
    for (int serial = 0; serial < 2 * (int)KINDS + 2; serial++) {
        char name[16];

        snprintf(name, sizeof name, "d%02d", serial);
        MUST(mkdir(name, 0700));
    }
    MUST(chdir("d00"));
    for (size_t i = 0; i < KINDS; i++)
        children[i] = MUST(clone(live, stacks[i] + STACK, kinds[i].flags | kinds[i].exit_signal, &desks[i]));
    for (size_t i = 0; i < KINDS; i++)
        ask(&desks[i], LOOK, 0);        /* they are there */
    ready();
    wait_for_go();
    for (size_t i = 0; i < KINDS; i++)
        check_child((int)i);
    for (size_t i = 0; i < KINDS; i++) {
        post(&desks[i].order, LEAVE);
        CHECK(waitpid(children[i], &status, __WALL) == children[i], "waitpid");
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 40 + (int)i, "status %#x", (unsigned)status);
    }
    return 0;
}

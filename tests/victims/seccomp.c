/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * seccomp(2): each task has its own chain of filters again, in the old order, and threads share what all of them have.
 *
 *     leader      A B D, without no_new_privs if it may; D kills it for calls that a checkpoint wants of it
 *       thread    A B C
 *     strict      strict mode
 *     shared      A B E in two threads, which share them: a further filter for both is taken by the kernel
 *     dropped     A B, and then it gave up the rights with which it had set them
 *
 * A filter has a number N. It answers getpgid(BASE + N) with the error 200 + N, and getpgid(BASE) too, where the newest
 * filter's answer counts (seccomp(2)).
 */
#include "victim.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { BASE = 0x10000, A = 1, B, C, D, E, F };

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(action) BPF_STMT(BPF_RET | BPF_K, action)
#define IF_NOT(value, skip) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skip)
#define KILL(number) IF_NOT(number, 1), RETURN(SECCOMP_RET_KILL_PROCESS)

static void install(unsigned int number, unsigned int flags)
{
    struct sock_filter filter[] = {
        LOAD(nr), IF_NOT(SYS_getpgid, 5),
        LOAD(args[0]), IF_NOT(BASE, 1), RETURN(SECCOMP_RET_ERRNO | (200 + number)),
        IF_NOT(BASE + number, 1), RETURN(SECCOMP_RET_ERRNO | (200 + number)),
        RETURN(SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};

    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program) == 0, "filter %u", number);
}

/* What a checkpoint wants a task to do, and what it does at a restart. */
static void install_deadly(unsigned int number)
{
    struct sock_filter filter[] = {
        LOAD(nr), KILL(SYS_mmap), KILL(SYS_munmap), KILL(SYS_prctl), KILL(SYS_sigaltstack), KILL(SYS_rt_sigaction),
        KILL(SYS_modify_ldt), KILL(SYS_keyctl), KILL(SYS_get_robust_list), KILL(SYS_tgkill), KILL(SYS_rseq),
        KILL(SYS_seccomp), KILL(SYS_brk), KILL(SYS_arch_prctl), KILL(SYS_close_range), KILL(SYS_preadv),
        IF_NOT(SYS_getpgid, 3), LOAD(args[0]), IF_NOT(BASE + number, 1), RETURN(SECCOMP_RET_ERRNO | (200 + number)),
        RETURN(SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};

    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_LOG, &program));
}

static int answer(unsigned int number)
{
    errno = 0;
    return syscall(SYS_getpgid, BASE + number) == -1 ? errno - 200 : 0;
}

/* Without malloc, which may want mmap. */
static void check_chain(const char *who, int count, unsigned int newest, unsigned int own)
{
    static __thread char text[1 << 14];
    char wanted[64], path[64];

    CHECK(answer(A) == A, "%s: filter A is gone", who);
    CHECK(answer(B) == B, "%s: filter B is gone", who);
    CHECK(answer(0) == (int)newest, "%s: filter %d answers, not %u", who, answer(0), newest);
    for (unsigned int number = C; number <= E; number++)
        CHECK((answer(number) == (int)number) == (number == own), "%s: filter %u", who, number);
    snprintf(path, sizeof path, "/proc/self/task/%d/status", my_tid());
    read_file(path, text, sizeof text);
    snprintf(wanted, sizeof wanted, "Seccomp_filters:\t%d\n", count);
    if (strstr(text, "Seccomp_filters:"))       /* since Linux 5.9 */
        CHECK(strstr(text, wanted), "%s: not %s", who, wanted);
}

/* The pipes between the leader and another task. me: those of this process. */
struct peer {
    int go[2], told[2];
};
static struct peer strict, shared, dropped, beside;
static struct peer *me;

static void tell(int fd, char word)
{
    CHECK(write(fd, &word, 1) == 1, "write");
}

static void hear(int fd, char wanted)
{
    char word;

    CHECK(read(fd, &word, 1) == 1 && word == wanted, "the word %c, not %c", word, wanted);
}

static void *thread_main(void *unused)
{
    install(C, 0);
    check_chain("thread", 3, C, C);
    tell(beside.told[1], 'r');
    hear(beside.go[0], 'g');
    check_chain("thread", 3, C, C);
    tell(beside.told[1], 'd');
    return unused;
}

static void strict_main(void)
{
    char word;

    MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
    if (write(me->told[1], "r", 1) == 1 && read(me->go[0], &word, 1) == 1 && write(me->told[1], "d", 1) == 1)
        syscall(SYS_getpid);
    syscall(SYS_exit, 1);
}

static int inner[2];

static void *shared_thread(void *unused)
{
    hear(inner[0], 't');
    return unused;
}

static void shared_main(void)
{
    pthread_t thread;

    MUST(pipe2(inner, O_CLOEXEC));
    install(E, 0);
    CHECK(pthread_create(&thread, NULL, shared_thread, NULL) == 0, "pthread_create");
    tell(me->told[1], 'r');
    hear(me->go[0], 'g');
    check_chain("shared", 3, E, E);
    install(F, SECCOMP_FILTER_FLAG_TSYNC);
    tell(inner[1], 't');
    CHECK(pthread_join(thread, NULL) == 0, "pthread_join");
    tell(me->told[1], 'd');
    _exit(0);
}

static void dropped_main(void)
{
    if (geteuid() == 0)
        MUST(setresuid(65534, 65534, 65534));
    tell(me->told[1], 'r');
    hear(me->go[0], 'g');
    check_chain("dropped", 2, B, 0);
    tell(me->told[1], 'd');
    _exit(0);
}

static pid_t start(struct peer *peer, void (*run)(void))
{
    pid_t child = MUST(fork());

    if (child == 0) {
        not_the_one_to_report();
        me = peer;
        run();
    }
    hear(peer->told[0], 'r');
    return child;
}

static void end(const char *who, const struct peer *peer, pid_t child, int wanted)
{
    int status;

    tell(peer->go[1], 'g');
    hear(peer->told[0], 'd');
    CHECK(waitpid(child, &status, 0) == child && status == wanted, "%s ended with %#x", who, (unsigned int)status);
}

int main(void)
{
    struct peer *const peers[] = {&strict, &shared, &dropped, &beside};
    pid_t strict_child, shared_child, dropped_child;
    pthread_t thread;

    for (unsigned int i = 0; i < sizeof peers / sizeof *peers; i++) {
        MUST(pipe2(peers[i]->go, O_CLOEXEC));
        MUST(pipe2(peers[i]->told, O_CLOEXEC));
    }
    strict_child = start(&strict, strict_main);
    if (geteuid() != 0)
        MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    install(A, 0);
    install(B, SECCOMP_FILTER_FLAG_LOG);
    shared_child = start(&shared, shared_main);
    dropped_child = start(&dropped, dropped_main);
    CHECK(pthread_create(&thread, NULL, thread_main, NULL) == 0, "pthread_create");
    hear(beside.told[0], 'r');
    ready();
    install_deadly(D);
    check_chain("leader", 3, B, D);
    wait_for_go();
    check_chain("leader", 3, B, D);
    end("strict", &strict, strict_child, SIGKILL);
    end("shared", &shared, shared_child, 0);
    end("dropped", &dropped, dropped_child, 0);
    tell(beside.go[1], 'g');
    hear(beside.told[0], 'd');
    /* the thread ends with the process: its own end wants munmap */
    _exit(0);
}

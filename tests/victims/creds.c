/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Credentials: processes that dropped from root to other ids in every way. As an ordinary user only what such a one
 * can change.
 */
#include "victim.h"

#include <grp.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define LINES 13
static const char *const lines[LINES] = {"Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb",
                                         "NoNewPrivs", "Umask", "Seccomp", "NSpid", "Threads"};

struct picture {
    char *line[LINES];
    int securebits, keepcaps, dumpable, no_new_privs;
};

static struct picture look(void)
{
    struct picture seen = {.securebits = prctl(PR_GET_SECUREBITS), .keepcaps = prctl(PR_GET_KEEPCAPS),
                           .dumpable = prctl(PR_GET_DUMPABLE), .no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)};

    for (int i = 0; i < LINES; i++)
        seen.line[i] = status_line("/proc/self/status", lines[i]);
    return seen;
}

static void compare(const struct picture *before, const struct picture *after)
{
    for (int i = 0; i < LINES; i++)
        CHECK(strcmp(before->line[i], after->line[i]) == 0, "%s was %s and is %s", lines[i], before->line[i],
              after->line[i]);
    CHECK(before->securebits == after->securebits, "securebits %#x", after->securebits);
    CHECK(before->keepcaps == after->keepcaps, "keepcaps %d", after->keepcaps);
    CHECK(before->dumpable == after->dumpable, "dumpable %d", after->dumpable);
    CHECK(before->no_new_privs == after->no_new_privs, "no_new_privs %d", after->no_new_privs);
}

static void set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];

    for (int i = 0; i < 2; i++)
        data[i] = (struct __user_cap_data_struct){(uint32_t)(effective >> 32 * i), (uint32_t)(permitted >> 32 * i),
                                                  (uint32_t)(inheritable >> 32 * i)};
    MUST(syscall(SYS_capset, &header, data));
}

static void as_nobody(void)
{
    MUST(setgroups(3, (gid_t[]){100, 200, 65534}));
    MUST(setresgid(65534, 65534, 65534));
    MUST(setresuid(65534, 65534, 65534));
}

/* every id another one */
static void as_many(void)
{
    MUST(setgroups(0, NULL));
    MUST(setresgid(1001, 1002, 1003));
    MUST(setresuid(1001, 1002, 1003));
    MUST(syscall(SYS_setfsgid, 1001) == 1002 ? 0 : -1);
}

/* a user with two capabilities, one of them ambient, and a smaller bounding set */
static void as_capable(void)
{
    const uint64_t chown_bit = 1ull << CAP_CHOWN, kill_bit = 1ull << CAP_KILL;

    MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_TIME, 0, 0, 0));
    MUST(prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0));
    MUST(setresgid(1004, 1004, 1004));
    MUST(setresuid(1004, 1004, 1004));
    set_capabilities(kill_bit, chown_bit | kill_bit, chown_bit | kill_bit);
    MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_KILL, 0, 0));
    MUST(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
}

static void as_root_without_magic(void)
{
    MUST(prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NO_SETUID_FIXUP | SECBIT_KEEP_CAPS));
    set_capabilities(1ull << CAP_SYS_PTRACE, 1ull << CAP_SYS_PTRACE | 1ull << CAP_FOWNER, 0);
}

static void as_one_who_gains_nothing(void)
{
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    umask(0137);
}

static void (*const ways_of_root[])(void) = {as_nobody, as_many, as_capable, as_root_without_magic,
                                             as_one_who_gains_nothing};
static void (*const ways_of_others[])(void) = {as_one_who_gains_nothing};

static int prepared[2], release[2];

static pid_t start(void (*way)(void))
{
    pid_t child = MUST(fork());
    struct picture before, after;
    char byte;

    if (child != 0)
        return child;
    not_the_one_to_report();
    close(release[1]);
    way();
    before = look();
    MUST(write(prepared[1], "p", 1));
    CHECK(read(release[0], &byte, 1) == 0, "release");
    after = look();
    compare(&before, &after);
    _exit(0);
}

int main(void)
{
    size_t count = geteuid() == 0 ? sizeof ways_of_root / sizeof *ways_of_root : 1;
    void (*const *ways)(void) = geteuid() == 0 ? ways_of_root : ways_of_others;
    struct picture before, after;
    pid_t children[16];
    int status;
    char byte;

    MUST(pipe(prepared));
    MUST(pipe(release));
    for (size_t i = 0; i < count; i++)
        children[i] = start(ways[i]);
    for (size_t i = 0; i < count; i++)
        CHECK(read(prepared[0], &byte, 1) == 1, "prepared");
    before = look();
    ready();
    wait_for_go();
    after = look();
    compare(&before, &after);
    close(release[1]);
    for (size_t i = 0; i < count; i++)
        CHECK(waitpid(children[i], &status, 0) == children[i] && status == 0, "child %zu: %#x", i, status);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Settings that newer kernels have: huge pages off but where madvise(2) asks for them, a private hash of futexes; NUMA
 * memory policies, of a thread and of mappings; the nice value of the autogroup; and the id of the login that a process
 * descends from, for the audit log. A child inherits that with the session. It has keyrings, too, which are lost.
 */
#include "victim.h"

#include <linux/keyctl.h>
#include <linux/mempolicy.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* <linux/prctl.h> of Linux 6.18 and 6.17 */
#ifndef PR_THP_DISABLE_EXCEPT_ADVISED
#define PR_THP_DISABLE_EXCEPT_ADVISED (1 << 1)
#endif
#ifndef PR_FUTEX_HASH
#define PR_FUTEX_HASH 78
#define PR_FUTEX_HASH_SET_SLOTS 1
#define PR_FUTEX_HASH_GET_SLOTS 2
#endif

#define AUTOGROUP "/proc/self/autogroup"       /* /autogroup-NUMBER nice N */

struct settings {
    int thp_disable, slots, policy, of_mapping, of_heap;
    unsigned long nodes, nodes_of_mapping;
    char login[16], session[16], autogroup[64];
};

static char *bound;

static struct settings look(void)
{
    struct settings seen = {.thp_disable = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0),
                            .slots = prctl(PR_FUTEX_HASH, PR_FUTEX_HASH_GET_SLOTS, 0, 0, 0)};

    syscall(SYS_get_mempolicy, &seen.policy, &seen.nodes, 8 * sizeof seen.nodes, NULL, 0);
    syscall(SYS_get_mempolicy, &seen.of_mapping, &seen.nodes_of_mapping, 8 * sizeof seen.nodes, bound, MPOL_F_ADDR);
    syscall(SYS_get_mempolicy, &seen.of_heap, NULL, 0, sbrk(0) - 1, MPOL_F_ADDR);
    if (access(AUTOGROUP, R_OK) == 0)       /* with CONFIG_SCHED_AUTOGROUP */
        read_file(AUTOGROUP, seen.autogroup, sizeof seen.autogroup);
    if (access("/proc/self/loginuid", R_OK) == 0) {     /* with CONFIG_AUDIT */
        read_file("/proc/self/loginuid", seen.login, sizeof seen.login);
        read_file("/proc/self/sessionid", seen.session, sizeof seen.session);
    }
    return seen;
}

static void check(const struct settings *before)
{
    struct settings after = look();

    CHECK(before->thp_disable == after.thp_disable, "thp_disable %d, not %d", after.thp_disable, before->thp_disable);
    CHECK(before->slots == after.slots, "futex hash of %d slots, not %d", after.slots, before->slots);
    CHECK(before->policy == after.policy && before->nodes == after.nodes,
          "memory policy %d of nodes %#lx, not %d of %#lx", after.policy, after.nodes, before->policy, before->nodes);
    CHECK(before->of_mapping == after.of_mapping && before->nodes_of_mapping == after.nodes_of_mapping,
          "policy %#x of a mapping and nodes %#lx, not %#x of %#lx", after.of_mapping, after.nodes_of_mapping,
          before->of_mapping, before->nodes_of_mapping);
    CHECK(before->of_heap == after.of_heap, "policy %d of the heap, not %d", after.of_heap, before->of_heap);
    CHECK(strcmp(strchrnul(before->autogroup, ' '), strchrnul(after.autogroup, ' ')) == 0, "autogroup %s, not %s",
          after.autogroup, before->autogroup);
    CHECK(strcmp(before->login, after.login) == 0, "loginuid %s, not %s", after.login, before->login);
}

static void log_in(const char *uid)
{
    int fd = open("/proc/self/loginuid", O_WRONLY | O_CLOEXEC);

    if (fd >= 0) {
        /* refused where it is set, and the rules for the audit say that it stays */
        if (write(fd, uid, strlen(uid)) < 0)
            CHECK(errno == EPERM, "loginuid");
        close(fd);
    }
}

static void set_autogroup(const char *nice)
{
    int fd = open(AUTOGROUP, O_WRONLY | O_CLOEXEC);

    if (fd >= 0) {
        CHECK(write(fd, nice, strlen(nice)) > 0, "autogroup");
        close(fd);
    }
}

static pthread_barrier_t checked;

static void *thread_main(void *unused)
{
    pthread_barrier_wait(&checked);
    return unused;
}

int main(void)
{
    struct settings before, child_before, after, child_after;
    unsigned long first_node = 1;
    int go[2], told[2], status;
    pthread_t thread;
    pid_t child;

    log_in("54321");
    set_autogroup("5");
    syscall(SYS_set_mempolicy, MPOL_PREFERRED, &first_node, 8 * sizeof first_node);     /* ENOSYS without CONFIG_NUMA */
    bound = MUST(mmap(NULL, 16 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    fill(bound, 4 * 4096, 1);
    syscall(SYS_mbind, bound, 8 * 4096, MPOL_BIND | MPOL_F_STATIC_NODES, &first_node, 8 * sizeof first_node, 0);
    syscall(SYS_add_key, "user", "victim", "secret", 6, KEY_SPEC_THREAD_KEYRING);
    if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) != -1)
        syscall(SYS_add_key, "user", "of the session", "secret", 6, KEY_SPEC_SESSION_KEYRING);
    if (prctl(PR_SET_THP_DISABLE, 1, PR_THP_DISABLE_EXCEPT_ADVISED, 0, 0) != 0)
        MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    MUST(pipe(go));
    MUST(pipe(told));
    child = MUST(fork());
    if (child == 0) {
        char byte;

        not_the_one_to_report();
        child_before = look();
        CHECK(read(go[0], &byte, 1) == 1, "the word to go");
        check(&child_before);
        child_after = look();
        CHECK(write(told[1], &child_after, sizeof child_after) == sizeof child_after, "write");
        _exit(0);
    }
    pthread_barrier_init(&checked, NULL, 2);
    CHECK(pthread_create(&thread, NULL, thread_main, NULL) == 0, "pthread_create");
    prctl(PR_FUTEX_HASH, PR_FUTEX_HASH_SET_SLOTS, 256, 0, 0);      /* not every kernel has it */
    before = look();
    ready();
    wait_for_go();
    check(&before);
    after = look();
    CHECK(write(go[1], "", 1) == 1, "write");
    CHECK(read(told[0], &child_after, sizeof child_after) == sizeof child_after, "read");
    CHECK(strcmp(after.session, child_after.session) == 0, "session %s, that of the child %s", after.session,
          child_after.session);
    pthread_barrier_wait(&checked);
    CHECK(pthread_join(thread, NULL) == 0, "pthread_join");
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with %#x", (unsigned int)status);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Shapes of process trees: sessions, process groups with and without their leader, zombies with their exit codes,
 * orphans, children of threads, a subreaper. Every process checks its own ids after the wait.
 */
#include "victim.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

struct ids {
    pid_t pid, ppid, pgid, sid;
};
/* shared by all: how many are prepared, and how many have checked themselves */
static struct shared {
    int prepared, checked;
} *shared;
static int expected;            /* processes that wait for the end of `release` */
static int release[2];          /* its closing says: check yourselves */
static int leave[2];            /* its closing says: end */

static struct ids ids_now(void)
{
    return (struct ids){getpid(), getppid(), getpgrp(), getsid(0)};
}

/* What each process does when its place in the tree is prepared; ends it. */
static void wait_and_check(void)
{
    struct ids before = ids_now(), after;
    char byte;

    close(release[1]);
    close(leave[1]);
    __atomic_add_fetch(&shared->prepared, 1, __ATOMIC_RELEASE);
    CHECK(read(release[0], &byte, 1) == 0, "release");
    after = ids_now();
    CHECK(memcmp(&before, &after, sizeof before) == 0, "pid %d ppid %d pgid %d sid %d, not %d %d %d %d", after.pid,
          after.ppid, after.pgid, after.sid, before.pid, before.ppid, before.pgid, before.sid);
    __atomic_add_fetch(&shared->checked, 1, __ATOMIC_RELEASE);
    CHECK(read(leave[0], &byte, 1) == 0, "leave");       /* not before all have: a dead parent is another ppid */
    _exit(0);
}

/* 0 in the child */
static pid_t child(void)
{
    pid_t pid = MUST(fork());

    if (pid == 0)
        not_the_one_to_report();
    return pid;
}

static void plain_child(void)
{
    expected++;
    if (child() == 0)
        wait_and_check();
}

/* a session leader with a child in its session, and one in a group of its own there */
static void session(void)
{
    expected += 3;
    if (child() != 0)
        return;
    MUST(setsid());
    if (child() == 0)
        wait_and_check();
    if (child() == 0) {
        MUST(setpgid(0, 0));
        wait_and_check();
    }
    wait_and_check();
}

/* two in a group whose leader is dead and reaped */
static void group_without_leader(void)
{
    int go_on[2];
    pid_t leader;
    char byte;

    MUST(pipe(go_on));
    leader = child();
    if (leader == 0) {
        CHECK(read(go_on[0], &byte, 1) == 1, "pipe");
        _exit(0);
    }
    MUST(setpgid(leader, leader));
    expected += 2;
    for (int i = 0; i < 2; i++) {
        pid_t member = child();

        if (member == 0) {
            while (getpgrp() != leader)
                sched_yield();
            close(go_on[0]);
            close(go_on[1]);
            wait_and_check();
        }
        MUST(setpgid(member, leader));
    }
    MUST(write(go_on[1], "g", 1));
    CHECK(waitpid(leader, NULL, 0) == leader, "waitpid");
    close(go_on[0]);
    close(go_on[1]);
}

/* a member of a session whose leader is dead: an orphan, which the subreaper above takes */
static void orphan_in_dead_session(void)
{
    pid_t leader = child();

    expected++;
    if (leader == 0) {
        MUST(setsid());
        pid_t parent = getpid();

        if (child() == 0) {
            while (getppid() == parent)
                sched_yield();
            wait_and_check();
        }
        _exit(0);
    }
    CHECK(waitpid(leader, NULL, 0) == leader, "waitpid");
}

static void *fork_from_thread(void *unused)
{
    pid_t pid = child();

    if (pid == 0)
        wait_and_check();
    pause();        /* the parent thread of the child stays */
    return unused;
}

static void child_of_thread(void)
{
    pthread_t thread;

    expected++;
    CHECK(pthread_create(&thread, NULL, fork_from_thread, NULL) == 0, "pthread_create");
}

static pid_t exited, killed;

/* Zombies: nobody waits for them before the check. */
static void zombies(void)
{
    siginfo_t info;

    exited = child();
    if (exited == 0)
        _exit(77);
    killed = child();
    if (killed == 0) {
        raise(SIGKILL);
        _exit(1);
    }
    MUST(waitid(P_PID, (id_t)exited, &info, WEXITED | WNOWAIT));
    MUST(waitid(P_PID, (id_t)killed, &info, WEXITED | WNOWAIT));
}

static void check_zombies(void)
{
    int status;

    CHECK(waitpid(exited, &status, 0) == exited && WIFEXITED(status) && WEXITSTATUS(status) == 77, "status %#x", status);
    CHECK(waitpid(killed, &status, 0) == killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "status %#x",
          status);
}

/* a chain of descendants, each the only child of the one before, that ends from below */
static void deep_chain(int depth)
{
    expected += depth;
    for (int i = 0; i < depth; i++) {
        if (child() != 0) {
            if (i > 0)
                wait_and_check();
            return;
        }
    }
    wait_and_check();
}

static void await(int *counter)
{
    double deadline = now() + 20;

    while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < expected) {
        CHECK(now() < deadline, "%d of %d processes", *counter, expected);
        sched_yield();
    }
}

/* With an argument: it comes back in a pid namespace of its own, whose first process is then its parent. */
int main(int argc, char **argv)
{
    int status, subreaper = 0, ended = 0;
    struct ids before;
    pid_t pid;

    shared = MUST(mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    MUST(pipe(release));
    MUST(pipe(leave));
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
    plain_child();
    session();
    group_without_leader();
    orphan_in_dead_session();
    deep_chain(8);
    zombies();
    child_of_thread();
    await(&shared->prepared);
    before = ids_now();
    if (argc > 1)
        before.ppid = atoi(argv[1]);
    ready();
    wait_for_go();

    CHECK(memcmp(&before, &(struct ids){getpid(), getppid(), getpgrp(), getsid(0)}, sizeof before) == 0, "own ids");
    MUST(prctl(PR_GET_CHILD_SUBREAPER, &subreaper, 0, 0, 0));
    CHECK(subreaper == 1, "no longer a subreaper");
    check_zombies();
    close(release[1]);
    await(&shared->checked);
    close(leave[1]);
    while ((pid = waitpid(-1, &status, 0)) > 0) {
        CHECK(status == 0, "process %d ended with %#x", pid, status);
        ended++;
    }
    CHECK(errno == ECHILD && ended == expected, "%d of %d processes ended here", ended, expected);
    return 0;
}

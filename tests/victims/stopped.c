/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Job control: children stopped by SIGSTOP and SIGTSTP stay stopped, their parent still can learn of it, and SIGCONT
 * lets them go on.
 */
#include "victim.h"

#include <signal.h>
#include <sys/wait.h>

static pid_t start(int by)
{
    pid_t child = MUST(fork());

    if (child == 0) {
        not_the_one_to_report();
        /* with its parent in another group of the session; an orphaned group ignores SIGTSTP (POSIX) */
        MUST(setpgid(0, 0));
        MUST(raise(by));
        _exit(31);
    }
    return child;
}

static void await_stop(pid_t child, int by)
{
    siginfo_t info;

    MUST(waitid(P_PID, (id_t)child, &info, WSTOPPED | WNOWAIT));
    CHECK(info.si_status == by, "stopped by %d", info.si_status);
}

/* A stop that its parent can still wait for is by the same signal; the child goes on and ends. */
static void check_stopped(pid_t child, int by)
{
    siginfo_t info = {0};
    int status;

    MUST(waitid(P_PID, (id_t)child, &info, WSTOPPED | WNOHANG));
    CHECK(info.si_pid == child && info.si_code == CLD_STOPPED && info.si_status == by, "child %d: stopped by %d, not %d",
          info.si_pid, info.si_status, by);
    MUST(kill(child, SIGCONT));
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 31, "status %#x", status);
}

/*
 * A job of two processes: the first is the leader of its group and the parent of the second, which was stopped. Its
 * group is not orphaned, as the parent of the first is in another one. With `moved` the second was stopped in a group of
 * its own, before it joined one that is orphaned; with `led` the first joined the second's.
 */
enum job {TOGETHER, MOVED, LED};

static pid_t start_job(enum job job, int by, int fds[2])
{
    pid_t leader, second;
    char byte;
    int told[2];

    MUST(pipe(fds));
    MUST(pipe(told));
    leader = MUST(fork());
    if (leader != 0) {
        close(fds[0]);
        close(told[1]);
        CHECK(read(told[0], &byte, 1) == 1, "the job did not begin");
        close(told[0]);
        return leader;
    }
    not_the_one_to_report();
    close(fds[1]);
    close(told[0]);
    if (job != LED)
        MUST(job == MOVED ? setsid() : setpgid(0, 0));
    second = MUST(fork());
    if (second == 0) {
        if (job != TOGETHER)
            MUST(setpgid(0, 0));
        MUST(raise(by));
        _exit(31);
    }
    await_stop(second, by);
    if (job == MOVED)
        MUST(setpgid(second, getpgrp()));
    if (job == LED)
        MUST(setpgid(0, second));
    MUST(write(told[1], "s", 1));
    close(told[1]);
    CHECK(read(fds[0], &byte, 1) == 1, "the word");
    CHECK(getpgid(second) == getpgrp(), "the job is in two groups");
    check_stopped(second, by);
    _exit(0);
}

static void finish_job(pid_t leader, int fd)
{
    int status;

    CHECK(write(fd, "g", 1) == 1, "the word");
    CHECK(waitpid(leader, &status, 0) == leader && status == 0, "the job ended with %#x", status);
}

static char state_of(pid_t pid)
{
    char path[32], text[4096];

    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    read_file(path, text, sizeof text);
    return strrchr(text, ')')[2];
}

int main(void)
{
    pid_t told, untold, by_reading, jobs[3];
    int status, fds[3][2];

    told = start(SIGSTOP);
    untold = start(SIGTSTP);
    by_reading = start(SIGTTIN);
    CHECK(waitpid(told, &status, WUNTRACED) == told && WIFSTOPPED(status), "status %#x", status);
    await_stop(untold, SIGTSTP);
    await_stop(by_reading, SIGTTIN);
    jobs[TOGETHER] = start_job(TOGETHER, SIGTSTP, fds[TOGETHER]);
    jobs[MOVED] = start_job(MOVED, SIGTTOU, fds[MOVED]);
    jobs[LED] = start_job(LED, SIGTTIN, fds[LED]);
    ready();
    wait_for_go();

    CHECK(state_of(told) == 'T' && state_of(untold) == 'T', "states %c %c", state_of(told), state_of(untold));
    check_stopped(untold, SIGTSTP);
    check_stopped(by_reading, SIGTTIN);
    CHECK(waitpid(told, &status, WUNTRACED | WNOHANG) == 0, "a stop that was waited for is told again: %#x", status);
    MUST(kill(told, SIGCONT));
    CHECK(waitpid(told, &status, 0) == told && WIFEXITED(status) && WEXITSTATUS(status) == 31, "status %#x", status);
    for (int job = TOGETHER; job <= LED; job++)
        finish_job(jobs[job], fds[job][1]);
    return 0;
}

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

static char state_of(pid_t pid)
{
    char path[32], text[4096];

    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    read_file(path, text, sizeof text);
    return strrchr(text, ')')[2];
}

int main(void)
{
    pid_t told, untold;
    int status;
    siginfo_t info;

    told = start(SIGSTOP);
    untold = start(SIGTSTP);
    CHECK(waitpid(told, &status, WUNTRACED) == told && WIFSTOPPED(status), "status %#x", status);
    MUST(waitid(P_PID, (id_t)untold, &info, WSTOPPED | WNOWAIT));
    ready();
    wait_for_go();

    CHECK(state_of(told) == 'T' && state_of(untold) == 'T', "states %c %c", state_of(told), state_of(untold));
    CHECK(waitpid(untold, &status, WUNTRACED | WNOHANG) == untold && WIFSTOPPED(status) && WSTOPSIG(status) == SIGTSTP,
          "status %#x", status);
    MUST(kill(told, SIGCONT));
    MUST(kill(untold, SIGCONT));
    CHECK(waitpid(told, &status, 0) == told && WIFEXITED(status) && WEXITSTATUS(status) == 31, "status %#x", status);
    CHECK(waitpid(untold, &status, 0) == untold && WIFEXITED(status) && WEXITSTATUS(status) == 31, "status %#x", status);
    return 0;
}

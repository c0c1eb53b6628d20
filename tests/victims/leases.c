/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Leases that somebody wants to be released: they are to become what they were to become, their holder has heard of it
 * once, and goes on holding them until it says otherwise. fs.lease-break-time (45 seconds) is its time for that.
 */
#include "victim.h"

#include <signal.h>
#include <sys/wait.h>

#define TOLD (SIGRTMIN + 4)

enum {KEPT, DOWNGRADED, ENDED, READ_ENDED, LEASES};

static const struct {
    const char *path;
    int lease, breaker, becomes;        /* breaker: flags of open(2), -1 for none */
    bool heard;                         /* its signal was taken before the wait; else it is pending */
} leases[LEASES] = {
    [KEPT] = {"kept", F_WRLCK, -1, F_WRLCK, true},
    [DOWNGRADED] = {"downgraded", F_WRLCK, O_RDONLY, F_RDLCK, false},
    [ENDED] = {"ended", F_WRLCK, O_RDWR, F_UNLCK, true},
    [READ_ENDED] = {"read ended", F_RDLCK, O_WRONLY, F_UNLCK, true},
};
static int fds[LEASES];

/* Whether another process can open the file now; the errno is its exit status. */
static int opened(const char *path, int flags)
{
    pid_t child = MUST(fork());
    int status;

    if (child == 0) {
        not_the_one_to_report();
        _exit(open(path, flags | O_NONBLOCK) == -1 ? errno : 0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status), "status %#x", status);
    return WEXITSTATUS(status);
}

/* The fd of the next signal about a lease, -1 for none. */
static int next_signal(void)
{
    sigset_t told;
    siginfo_t info;

    sigemptyset(&told);
    sigaddset(&told, TOLD);
    return sigtimedwait(&told, &info, &(struct timespec){0}) == -1 ? -1 : info.si_fd;
}

static void prepare(int which)
{
    int fd = MUST(open(leases[which].path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)), found;

    MUST(write(fd, "content", 7));
    close(fd);
    fd = fds[which] = MUST(open(leases[which].path, O_RDONLY | O_CLOEXEC));
    MUST(fcntl(fd, F_SETLEASE, leases[which].lease));
    MUST(fcntl(fd, F_SETSIG, TOLD));
    if (leases[which].breaker == -1)
        return;
    found = opened(leases[which].path, leases[which].breaker);
    CHECK(found == EWOULDBLOCK, "%s is opened with %d", leases[which].path, found);
    if (leases[which].heard)
        CHECK((found = next_signal()) == fd, "%s: signal of fd %d", leases[which].path, found);
}

int main(void)
{
    sigset_t told;
    int found;

    sigemptyset(&told);
    sigaddset(&told, TOLD);
    MUST(sigprocmask(SIG_BLOCK, &told, NULL));
    /* that of the one that is not heard comes last */
    prepare(KEPT);
    prepare(ENDED);
    prepare(READ_ENDED);
    prepare(DOWNGRADED);
    ready();
    wait_for_go();

    for (int i = 0; i < LEASES; i++)
        CHECK((found = fcntl(fds[i], F_GETLEASE)) == leases[i].becomes, "%s: lease %d", leases[i].path, found);
    CHECK((found = next_signal()) == fds[DOWNGRADED], "signal of fd %d", found);
    CHECK((found = next_signal()) == -1, "another signal of fd %d", found);
    /* of the two that are to end the one for reading lets readers in */
    CHECK((found = opened(leases[READ_ENDED].path, O_RDONLY)) == 0, "a reader is kept out: %d", found);
    CHECK((found = opened(leases[ENDED].path, O_RDONLY)) == EWOULDBLOCK, "a reader is let in: %d", found);
    CHECK((found = next_signal()) == -1, "a signal of fd %d, which has had one", found);
    MUST(fcntl(fds[DOWNGRADED], F_SETLEASE, F_RDLCK));
    CHECK((found = opened(leases[DOWNGRADED].path, O_RDONLY)) == 0, "the downgraded one keeps readers out: %d", found);
    MUST(fcntl(fds[ENDED], F_SETLEASE, F_UNLCK));
    CHECK((found = opened(leases[ENDED].path, O_RDWR)) == 0, "one that was released keeps writers out: %d", found);
    CHECK((found = opened(leases[KEPT].path, O_RDONLY)) == EWOULDBLOCK, "the kept one lets readers in: %d", found);
    CHECK((found = next_signal()) == fds[KEPT], "signal of fd %d", found);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Processes that wait for locks: POSIX, of an open file description, and flock(2). They still wait after a restart, and
 * get their lock when its holder releases it.
 */
#include "victim.h"

#include <sys/file.h>
#include <sys/wait.h>

enum { POSIX, OFD, FLOCK, KINDS };

static int files[KINDS];
static pid_t waiters[KINDS];
static const char *names[KINDS] = {"posix", "ofd", "flock"};

static int take(int kind, int fd, int wait)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    switch (kind) {
    case POSIX:
        return fcntl(fd, wait ? F_SETLKW : F_SETLK, &whole);
    case OFD:
        return fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &whole);
    default:
        return flock(fd, LOCK_EX | (wait ? 0 : LOCK_NB));
    }
}

static void release(int kind)
{
    struct flock whole = {.l_type = F_UNLCK, .l_whence = SEEK_SET};

    switch (kind) {
    case POSIX:
        MUST(fcntl(files[kind], F_SETLK, &whole));
        break;
    case OFD:
        MUST(fcntl(files[kind], F_OFD_SETLK, &whole));
        break;
    default:
        MUST(flock(files[kind], LOCK_UN));
    }
}

static pid_t start_waiter(int kind)
{
    pid_t child = MUST(fork());
    int fd;

    if (child != 0)
        return child;
    not_the_one_to_report();
    fd = MUST(open(names[kind], O_RDWR));
    CHECK(take(kind, fd, 1) == 0, "%s: the wait fails", names[kind]);
    _exit(7);
}

static void await_waiter(int kind)
{
    long number = -1, wanted = kind == FLOCK ? SYS_flock : SYS_fcntl;
    char path[64], text[256];

    snprintf(path, sizeof path, "/proc/%d/syscall", waiters[kind]);
    while (number != wanted) {
        read_file(path, text, sizeof text);
        number = text[0] == 'r' ? -1 : strtol(text, NULL, 10);
        sched_yield();
    }
}

int main(void)
{
    int status;

    for (int kind = 0; kind < KINDS; kind++) {
        files[kind] = MUST(open(names[kind], O_RDWR | O_CREAT | O_CLOEXEC, 0600));
        MUST(take(kind, files[kind], 0));
        waiters[kind] = start_waiter(kind);
    }
    for (int kind = 0; kind < KINDS; kind++)
        await_waiter(kind);
    ready();
    wait_for_go();
    for (int kind = 0; kind < KINDS; kind++) {
        CHECK(waitpid(waiters[kind], &status, WNOHANG) == 0, "%s: it does not wait", names[kind]);
        release(kind);
        CHECK(waitpid(waiters[kind], &status, 0) == waiters[kind] && WEXITSTATUS(status) == 7, "%s: status %#x",
              names[kind], status);
    }
    return 0;
}

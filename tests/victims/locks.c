/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What open files have besides content and position: locks and leases of every sort, who gets SIGIO, the other end that
 * is gone, a FIFO without a name, a memfd that nobody has mapped.
 */
#include "victim.h"

#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define WANTED (SIGRTMIN + 3)

static int of_process, of_description, flocked, leased, directory, severed, nameless, unmapped;
static int by_process[2], by_thread[2], by_group[2], to_child[2];
static pid_t child;

static int made(const char *path, int flags)
{
    int fd = MUST(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));

    MUST(write(fd, "content\n", 8));
    close(fd);
    return MUST(open(path, flags | O_CLOEXEC));
}

static struct flock range(short type, off_t start, off_t length)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
}

static void lock(int fd, int command, short type, off_t start, off_t length)
{
    struct flock wanted = range(type, start, length);

    MUST(fcntl(fd, command, &wanted));
}

static void signalled(int fds[2], int type, pid_t id)
{
    struct f_owner_ex owner = {.type = type, .pid = id};

    MUST(pipe(fds));
    MUST(fcntl(fds[0], F_SETOWN_EX, &owner));
    MUST(fcntl(fds[0], F_SETSIG, WANTED));
    MUST(fcntl(fds[0], F_SETFL, O_ASYNC | O_NONBLOCK));
}

static void prepare(void)
{
    int pair[2];
    sigset_t blocked;

    sigemptyset(&blocked);
    sigaddset(&blocked, WANTED);
    MUST(sigprocmask(SIG_BLOCK, &blocked, NULL));
    of_process = made("process", O_RDWR);
    lock(of_process, F_SETLK, F_WRLCK, 10, 10);
    lock(of_process, F_SETLK, F_RDLCK, 100, 0);
    of_description = made("description", O_RDWR);
    lock(of_description, F_OFD_SETLK, F_WRLCK, 5, 1);
    lock(of_description, F_OFD_SETLK, F_RDLCK, 7, 0);
    flocked = made("flocked", O_RDONLY);
    MUST(flock(flocked, LOCK_EX));
    leased = made("leased", O_RDONLY);
    MUST(fcntl(leased, F_SETLEASE, F_RDLCK));
    MUST(mkdir("locked", 0700));
    directory = MUST(open("locked", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    MUST(flock(directory, LOCK_SH));
    signalled(by_process, F_OWNER_PID, getpid());
    signalled(by_thread, F_OWNER_TID, my_tid());
    signalled(by_group, F_OWNER_PGRP, getpgrp());
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    MUST(write(pair[1], "last words", 10));
    close(pair[1]);
    severed = pair[0];
    MUST(mkfifo("fifo", 0620));
    nameless = MUST(open("fifo", O_RDWR | O_NONBLOCK));
    MUST(unlink("fifo"));
    MUST(write(nameless, "inside", 6));
    unmapped = MUST(memfd_create("unmapped", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    MUST(write(unmapped, "never mapped", 12));
    MUST(fcntl(unmapped, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK));
}

/* What a process that has no lock finds at a byte; it opens the file anew. */
static void check_lock(const char *path, off_t at, short type, pid_t holder)
{
    int fd = MUST(open(path, O_RDWR | O_CLOEXEC));
    struct flock found = range(F_WRLCK, at, 1);

    MUST(fcntl(fd, F_OFD_GETLK, &found));
    CHECK(found.l_type == type, "%s: byte %ld: lock of type %d, not %d", path, (long)at, found.l_type, type);
    CHECK(type == F_UNLCK || found.l_pid == holder, "%s: byte %ld: locked by %d, not %d", path, (long)at, found.l_pid,
          holder);
    close(fd);
}

static void check_locks(pid_t parent, pid_t other)
{
    int fd;

    check_lock("process", 9, F_UNLCK, 0);
    check_lock("process", 10, F_WRLCK, parent);
    check_lock("process", 19, F_WRLCK, parent);
    check_lock("process", 20, F_UNLCK, 0);
    check_lock("process", 30, F_RDLCK, other);
    check_lock("process", 99, F_UNLCK, 0);
    check_lock("process", 1 << 20, F_RDLCK, parent);
    check_lock("description", 5, F_WRLCK, -1);
    check_lock("description", 6, F_UNLCK, 0);
    check_lock("description", 1 << 20, F_RDLCK, -1);
    fd = MUST(open("flocked", O_RDONLY));
    CHECK(flock(fd, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK, "flock(2) is not there");
    fd = MUST(open("locked", O_RDONLY));
    CHECK(flock(fd, LOCK_SH | LOCK_NB) == 0, "flock(2) of a directory is not shared");
    CHECK(flock(fd, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "flock(2) of a directory is not there");
}

static pid_t in_child(void (*work)(pid_t, pid_t), pid_t one, pid_t other)
{
    pid_t made = MUST(fork());

    if (made == 0) {
        work(one, other);
        _exit(0);
    }
    return made;
}

/* It has a lock of its own, by an fd that it has from its parent. */
static void be_the_child(pid_t parent, pid_t ready_fd)
{
    char byte;

    (void)parent;
    not_the_one_to_report();
    close(to_child[1]);
    lock(of_process, F_SETLK, F_RDLCK, 30, 5);
    MUST(write(ready_fd, "x", 1));
    close(ready_fd);
    CHECK(read(to_child[0], &byte, 1) == 0, "read");
    CHECK(fcntl(leased, F_GETLEASE) == F_RDLCK, "lease in the child");
}

static void check_signal(int fds[2], int type, pid_t id, const char *who)
{
    struct f_owner_ex owner;
    siginfo_t info;
    sigset_t wanted;

    MUST(fcntl(fds[0], F_GETOWN_EX, &owner));
    CHECK((int)owner.type == type && owner.pid == id, "%s: owner %d of type %d", who, owner.pid, owner.type);
    CHECK(fcntl(fds[0], F_GETSIG) == WANTED, "%s: signal %d", who, fcntl(fds[0], F_GETSIG));
    CHECK((fcntl(fds[0], F_GETFL) & (O_ASYNC | O_NONBLOCK)) == (O_ASYNC | O_NONBLOCK), "%s: flags", who);
    sigemptyset(&wanted);
    sigaddset(&wanted, WANTED);
    CHECK(sigtimedwait(&wanted, &info, &(struct timespec){0}) == -1, "%s: a signal too early", who);
    MUST(write(fds[1], "x", 1));
    CHECK(sigtimedwait(&wanted, &info, &(struct timespec){5}) == WANTED, "%s: no signal", who);
    CHECK(info.si_fd == fds[0], "%s: signal of fd %d", who, info.si_fd);
}

static void check_content(int fd, const char *expected, ssize_t end)
{
    char text[64];
    ssize_t length = (ssize_t)strlen(expected);

    CHECK(read(fd, text, sizeof text) == length && memcmp(text, expected, (size_t)length) == 0, "not '%s'", expected);
    CHECK(read(fd, text, sizeof text) == end, "there is more after '%s'", expected);
}

int main(void)
{
    int status, ready_pipe[2];
    char byte;

    prepare();
    MUST(pipe(to_child));
    MUST(pipe(ready_pipe));
    child = in_child(be_the_child, getpid(), ready_pipe[1]);
    close(to_child[0]);
    close(ready_pipe[1]);
    CHECK(read(ready_pipe[0], &byte, 1) == 1, "the child has no lock");
    close(ready_pipe[0]);
    ready();
    wait_for_go();
    CHECK(waitpid(in_child(check_locks, getpid(), child), &status, 0) > 0 && status == 0, "locks: status %#x", status);
    CHECK(fcntl(leased, F_GETLEASE) == F_RDLCK, "lease %d", fcntl(leased, F_GETLEASE));
    check_signal(by_process, F_OWNER_PID, getpid(), "process");
    check_signal(by_thread, F_OWNER_TID, my_tid(), "thread");
    check_signal(by_group, F_OWNER_PGRP, getpgrp(), "group");
    check_content(severed, "last words", 0);
    CHECK(send(severed, "x", 1, MSG_NOSIGNAL) == -1 && errno == EPIPE, "somebody is at the other end");
    check_content(nameless, "inside", -1);
    CHECK(lseek(unmapped, 0, SEEK_CUR) == 12, "position of the memfd");
    MUST(lseek(unmapped, 0, SEEK_SET));
    check_content(unmapped, "never mapped", 0);
    CHECK(fcntl(unmapped, F_GET_SEALS) == (F_SEAL_GROW | F_SEAL_SHRINK), "seals %#x", fcntl(unmapped, F_GET_SEALS));
    MUST(close(to_child[1]));
    CHECK(waitpid(child, &status, 0) == child && status == 0, "child: status %#x", status);
    return 0;
}

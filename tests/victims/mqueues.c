/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * POSIX message queues: one with a name, which keeps its messages, one with a notification, and one that was unlinked
 * and that two descriptions share.
 */
#include "victim.h"

#include <mqueue.h>
#include <signal.h>
#include <sys/stat.h>

static mqd_t named, noted, to_read, to_write;
static char names[3][64];

static mqd_t create(int number, int flags, long most, long size)
{
    struct mq_attr attributes = {.mq_maxmsg = most, .mq_msgsize = size};

    snprintf(names[number], sizeof names[number], "/ckptd-victim-%d-%d", getpid(), number);
    return MUST(mq_open(names[number], flags | O_CREAT | O_EXCL, 0640, &attributes));
}

static void check_attributes(mqd_t queue, long flags, long most, long size, long now)
{
    struct mq_attr found;

    MUST(mq_getattr(queue, &found));
    CHECK(found.mq_flags == flags, "flags %#lo", found.mq_flags);
    CHECK(found.mq_maxmsg == most && found.mq_msgsize == size, "%ld of %ld", found.mq_maxmsg, found.mq_msgsize);
    CHECK(found.mq_curmsgs == now, "%ld messages", found.mq_curmsgs);
}

static void expect(mqd_t queue, const char *wanted, unsigned priority)
{
    char text[100] = "";
    unsigned found;

    MUST(mq_receive(queue, text, sizeof text, &found));
    CHECK(strcmp(text, wanted) == 0 && found == priority, "%s of priority %u", text, found);
}

static void prepare(void)
{
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    MUST(sigprocmask(SIG_BLOCK, &set, NULL));
    named = create(0, O_RDWR, 5, 100);
    MUST(mq_send(named, "low", 4, 1));
    MUST(mq_send(named, "high", 5, 9));
    MUST(mq_send(named, "low too", 8, 1));
    noted = create(1, O_RDWR | O_NONBLOCK, 3, 50);
    MUST(mq_notify(noted, &event));
    to_read = create(2, O_RDONLY | O_NONBLOCK, 4, 80);
    to_write = MUST(mq_open(names[2], O_WRONLY));
    MUST(fchmod(to_read, 0600));
    MUST(mq_unlink(names[2]));
}

int main(void)
{
    struct timespec some = {10, 0};
    struct stat found;
    siginfo_t info;
    sigset_t set;

    prepare();
    ready();
    wait_for_go();
    check_attributes(named, 0, 5, 100, 3);
    expect(named, "high", 9);
    expect(named, "low", 1);
    expect(named, "low too", 1);
    check_attributes(noted, O_NONBLOCK, 3, 50, 0);
    CHECK(mq_notify(noted, &(struct sigevent){.sigev_notify = SIGEV_NONE}) == -1 && errno == EBUSY, "not noted");
    MUST(mq_send(noted, "x", 1, 0));
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    CHECK(sigtimedwait(&set, &info, &some) == SIGUSR1 && info.si_code == SI_MESGQ, "no signal");
    check_attributes(to_read, O_NONBLOCK, 4, 80, 0);
    check_attributes(to_write, 0, 4, 80, 0);
    MUST(mq_send(to_write, "hello", 6, 3));
    expect(to_read, "hello", 3);
    CHECK(mq_send(to_read, "x", 1, 0) == -1 && errno == EBADF, "a queue for reading can be written");
    MUST(fstat(to_write, &found));
    CHECK((found.st_mode & 0777) == 0600 && found.st_nlink == 0, "mode %#o", found.st_mode);
    CHECK(mq_open(names[2], O_RDONLY) == -1 && errno == ENOENT, "the unlinked queue has a name");
    MUST(mq_unlink(names[0]));
    MUST(mq_unlink(names[1]));
    return 0;
}

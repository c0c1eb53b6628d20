/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * fanotify groups: marks of a file, of a directory with what is in it, ignored events, file handles instead of files.
 * Nothing but what this program does causes an event.
 */
#include "victim.h"

#include <sys/fanotify.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

static int files, names;

static void touch(const char *path)
{
    int fd = MUST(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));

    CHECK(write(fd, "x", 1) == 1, "write");
    close(fd);
}

/* all events that wait, as one mask */
static uint64_t events_of(int group)
{
    static char buffer[8192];
    struct fanotify_event_metadata *event = (void *)buffer;
    uint64_t mask = 0;
    ssize_t left = read(group, buffer, sizeof buffer);

    CHECK(left > 0 || errno == EAGAIN, "read");
    for (; left > 0 && FAN_EVENT_OK(event, left); event = FAN_EVENT_NEXT(event, left)) {
        mask |= event->mask;
        CHECK(event->pid == getpid(), "an event of process %d", event->pid);
        if (event->fd >= 0) {
            CHECK((fcntl(event->fd, F_GETFL) & O_ACCMODE) == O_RDWR, "flags %#o", fcntl(event->fd, F_GETFL));
            close(event->fd);
        }
    }
    return mask;
}

static void mark(int group, unsigned flags, uint64_t mask, const char *path)
{
    MUST(fanotify_mark(group, FAN_MARK_ADD | flags, mask, AT_FDCWD, path));
}

int main(void)
{
    touch("file");
    MUST(mkdir("directory", 0700));
    touch("directory/ignored");
    if (geteuid() == 0) {
        files = MUST(fanotify_init(FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_CLOEXEC, O_RDWR | O_LARGEFILE));
        mark(files, 0, FAN_CLOSE_WRITE, "file");
        mark(files, 0, FAN_CLOSE_WRITE | FAN_EVENT_ON_CHILD, "directory");
        mark(files, FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY, FAN_CLOSE_WRITE, "directory/ignored");
    }
    names = MUST(fanotify_init(FAN_CLASS_NOTIF | FAN_REPORT_DFID_NAME | FAN_NONBLOCK, 0));
    mark(names, 0, FAN_CREATE | FAN_DELETE | FAN_ONDIR, "directory");
    ready();
    wait_for_go();
    if (geteuid() == 0) {
        CHECK(events_of(files) == 0, "an event that this program did not cause");
        touch("file");
        CHECK(events_of(files) == FAN_CLOSE_WRITE, "no event of the file");
        touch("directory/ignored");
        CHECK(events_of(files) == 0, "an event of the ignored file");
        touch("directory/other");
        CHECK(events_of(files) == FAN_CLOSE_WRITE, "no event in the directory");
        MUST(unlink("directory/other"));
        CHECK(events_of(names) == (FAN_CREATE | FAN_DELETE), "no events of the names");
    }
    CHECK(events_of(names) == 0, "an event that this program did not cause");
    MUST(mkdir("directory/new", 0700));
    CHECK(events_of(names) == (FAN_CREATE | FAN_ONDIR), "no event of the new directory");
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * inotify instances: watches of files and directories, also renamed, deleted and nameless ones, with their numbers and
 * masks; shared by dup and fork, in an epoll, in flight. Nothing but what this program does causes an event.
 */
#include "victim.h"

#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define MANY 300        /* watches of the other instance */

static int ours, twin, other, polled, flight[2], to_child[2], deleted, memory, reader;
static int directory, here, moved, gone, nameless, link_itself, once;
static char before[1 << 16], after[1 << 16];

static int unread(int fd)
{
    int size;

    MUST(ioctl(fd, FIONREAD, &size));
    return size;
}

static void make(const char *path)
{
    close(MUST(open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600)));
}

/* Numbers and masks of the watches as the kernel has them, without inodes: "wd:mask " each, the newest first. */
static void masks(int fd, char *text, size_t size)
{
    char path[64], wd[16], mask[16], line[512];
    FILE *info;
    size_t used = 0;

    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
    info = fopen(path, "re");
    CHECK(info != NULL, "%s", path);
    while (fgets(line, sizeof line, info) != NULL)
        if (sscanf(line, "inotify wd:%15s ino:%*s sdev:%*s mask:%15s", wd, mask) == 2)
            used += (size_t)snprintf(text + used, size - used, "%s:%s ", wd, mask);
    fclose(info);
}

/* The next event, of those that are there. */
static void expect(int fd, int wd, uint32_t mask, const char *name)
{
    static char buffer[4096];
    static size_t at, filled;
    const struct inotify_event *event;
    const char *found;

    if (at == filled) {
        at = 0;
        CHECK(unread(fd) > 0, "no event where one of watch %d, mask %#x was expected", wd, mask);
        filled = (size_t)MUST(read(fd, buffer, sizeof buffer));
    }
    event = (const struct inotify_event *)(buffer + at);
    found = event->len ? event->name : "";
    at += sizeof *event + event->len;
    CHECK(event->wd == wd && event->mask == mask && strcmp(found, name) == 0,
          "watch %d, mask %#x, name '%s' where %d, %#x, '%s' was expected", event->wd, event->mask, found, wd, mask,
          name);
}

static void prepare(void)
{
    char name[32];

    ours = MUST(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
    twin = MUST(dup(ours));
    other = MUST(inotify_init1(0));
    MUST(mkdir("directory", 0700));
    make("directory/open");
    make("first");
    make("file");
    MUST(symlink("nowhere", "link"));
    reader = MUST(open("directory/open", O_RDONLY));
    CHECK(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, reader, 0) != MAP_FAILED, "mmap");
    deleted = MUST(open("deleted", O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    memory = MUST(memfd_create("memory", MFD_CLOEXEC));

    MUST(inotify_add_watch(ours, "file", IN_ALL_EVENTS));
    directory = MUST(inotify_add_watch(ours, "directory", IN_ALL_EVENTS | IN_ONLYDIR));
    here = MUST(inotify_add_watch(ours, ".", IN_CREATE | IN_MOVED_TO | IN_EXCL_UNLINK));
    moved = MUST(inotify_add_watch(ours, "first", IN_CLOSE_WRITE | IN_MASK_CREATE));
    MUST(rename("first", "second"));
    gone = MUST(inotify_add_watch(ours, "deleted", IN_MODIFY));
    MUST(unlink("deleted"));
    snprintf(name, sizeof name, "/proc/self/fd/%d", memory);
    nameless = MUST(inotify_add_watch(ours, name, IN_ATTRIB));
    link_itself = MUST(inotify_add_watch(ours, "link", IN_ATTRIB | IN_DONT_FOLLOW));
    MUST(inotify_rm_watch(ours, 1));
    once = MUST(inotify_add_watch(ours, "file", IN_ATTRIB | IN_ONESHOT));
    CHECK(once == 8, "watch %d", once);
    /* of the file that was removed, of the removed watch, of the renamed one and of the one that came */
    expect(ours, here, IN_MOVED_TO, "second");
    expect(ours, 1, IN_IGNORED, "");

    for (int i = 0; i < MANY; i++) {
        snprintf(name, sizeof name, "many-%d", i);
        make(name);
        MUST(inotify_add_watch(other, name, IN_ATTRIB));
    }
    while (unread(ours) > 0)        /* they were made here */
        MUST(read(ours, after, sizeof after));
    for (int wd = 1; wd <= MANY; wd += 2)
        MUST(inotify_rm_watch(other, wd));
    while (unread(other) > 0)
        MUST(read(other, after, sizeof after));
    polled = MUST(epoll_create1(EPOLL_CLOEXEC));
    MUST(epoll_ctl(polled, EPOLL_CTL_ADD, ours, &(struct epoll_event){.events = EPOLLIN, .data.u32 = 77}));
}

/* An instance that nobody has but a queue; it watches the file. */
static void send_one(void)
{
    char control[CMSG_SPACE(sizeof(int))] = "", byte = 'f';
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    int fd = MUST(inotify_init1(IN_NONBLOCK));

    MUST(inotify_add_watch(fd, "file", IN_ATTRIB));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, flight));
    *head = (struct cmsghdr){CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    MUST(sendmsg(flight[0], &message, 0));
    close(fd);
}

static int receive_one(void)
{
    char control[CMSG_SPACE(sizeof(int))], byte;
    struct iovec vector = {&byte, 1};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    int fd;

    CHECK(recvmsg(flight[1], &message, 0) == 1 && CMSG_FIRSTHDR(&message) != NULL, "recvmsg");
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static pid_t start_child(void)
{
    pid_t child;
    char byte;

    MUST(pipe(to_child));
    child = MUST(fork());
    if (child != 0)
        return child;
    not_the_one_to_report();
    close(to_child[1]);
    if (read(to_child[0], &byte, 1) != 1)
        _exit(2);
    /* the instance is the parent's, and so are its events */
    expect(ours, here, IN_CREATE, "for-the-child");
    CHECK(unread(ours) == 0, "%d bytes", unread(ours));
    _exit(0);
}

static void check_events(void)
{
    struct epoll_event event;
    int fd;

    CHECK(epoll_wait(polled, &event, 1, 0) == 0, "an event before there is one");
    make("directory/new");
    CHECK(epoll_wait(polled, &event, 1, 0) == 1 && event.data.u32 == 77, "no event of the epoll");
    expect(ours, directory, IN_CREATE, "new");
    expect(twin, directory, IN_OPEN, "new");
    expect(ours, directory, IN_CLOSE_WRITE, "new");
    fd = MUST(open("second", O_WRONLY));
    close(fd);
    expect(ours, moved, IN_CLOSE_WRITE, "");
    MUST(write(deleted, "x", 1));
    expect(ours, gone, IN_MODIFY, "");
    MUST(fchmod(memory, 0700));
    expect(ours, nameless, IN_ATTRIB, "");
    MUST(fchmodat(AT_FDCWD, "file", 0640, 0));
    expect(ours, once, IN_ATTRIB, "");
    expect(ours, once, IN_IGNORED, "");
    MUST(unlink("link"));
    expect(ours, link_itself, IN_ATTRIB, "");
    expect(ours, link_itself, IN_IGNORED, "");
    make("third");
    expect(ours, here, IN_CREATE, "third");
    CHECK(unread(ours) == 0, "%d bytes too many", unread(ours));
    CHECK(inotify_add_watch(ours, "third", IN_ATTRIB) == once + 1, "the next number");
}

int main(void)
{
    int status, fd;
    pid_t child;

    prepare();
    send_one();
    child = start_child();
    CHECK(unread(ours) == 0 && unread(other) == 0, "%d and %d bytes before", unread(ours), unread(other));
    masks(ours, before, sizeof before);
    masks(other, before + strlen(before), sizeof before - strlen(before));
    ready();
    wait_for_go();

    CHECK(unread(ours) == 0 && unread(other) == 0, "%d and %d bytes that this program has not caused", unread(ours),
          unread(other));
    masks(ours, after, sizeof after);
    masks(other, after + strlen(after), sizeof after - strlen(after));
    CHECK(strcmp(before, after) == 0, "%s where %s was", after, before);
    CHECK(fcntl(ours, F_GETFL) & O_NONBLOCK && !(fcntl(other, F_GETFL) & O_NONBLOCK), "flags");
    check_events();
    MUST(chmod("many-1", 0640));
    MUST(chmod("many-2", 0640));
    expect(other, 2, IN_ATTRIB, "");
    CHECK(unread(other) == 0, "an event of a removed watch");
    fd = receive_one();
    CHECK(unread(fd) == (int)sizeof(struct inotify_event), "%d bytes in flight", unread(fd));
    expect(fd, 1, IN_ATTRIB, "");
    make("for-the-child");
    MUST(write(to_child[1], "g", 1));
    CHECK(waitpid(child, &status, 0) == child && status == 0, "child: %#x", status);
    return 0;
}

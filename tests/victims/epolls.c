/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Entries of epolls that no longer have their fd: the file is open under another number, in another process, or in
 * flight. And what was reported: edges, one shots and all flags are as they were.
 */
#include "victim.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { FIRST, SECOND, IN_FLIGHT, OF_CHILD, READER, WRITER, SOCKET, ONCE, EXCLUSIVE, AWAKE };

static int moved, edges, fresh, once, flags, counter, second, ends[2], pair[2], carrier[2], trigger, pending[2], outer;
static unsigned exclusive, awake;
static pid_t child;

static void watch(int epoll, int fd, uint32_t events, uint64_t data)
{
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = events, .data.u64 = data}));
}

static unsigned ready_in(int epoll)
{
    struct epoll_event found[16];
    int count = MUST(epoll_wait(epoll, found, 16, 0));
    unsigned bits = 0;

    for (int i = 0; i < count; i++)
        bits |= 1u << found[i].data.u64;
    return bits;
}

static void expect(int epoll, unsigned bits, const char *what)
{
    unsigned found = ready_in(epoll);

    CHECK(found == bits, "%s: ready is %#x, not %#x", what, found, bits);
}

/* the events of the entry, as the kernel shows them */
static unsigned events_of(int epoll, int fd)
{
    char line[256];
    unsigned events, found = 0;
    int number;
    FILE *info;

    snprintf(line, sizeof line, "/proc/self/fdinfo/%d", epoll);
    info = fopen(line, "r");
    CHECK(info != NULL, "fdinfo");
    while (fgets(line, sizeof line, info) != NULL)
        if (sscanf(line, "tfd: %d events: %x", &number, &events) == 2 && number == fd)
            found = events;
    fclose(info);
    return found;
}

static void send_away(int fd)
{
    char byte = 'f', control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);

    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
    MUST(sendmsg(carrier[0], &message, 0));
}

static int take_back(void)
{
    char byte, control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    int fd;

    MUST(recvmsg(carrier[1], &message, MSG_CMSG_CLOEXEC));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

/* An eventfd that only the child has open. The child writes to it when the trigger is ready. */
static void start_child(void)
{
    int childs = MUST(eventfd(0, 0));
    uint64_t value = 1;

    trigger = MUST(eventfd(0, 0));
    watch(moved, childs, EPOLLIN, OF_CHILD);
    child = MUST(fork());
    if (child == 0) {
        not_the_one_to_report();
        CHECK(read(trigger, &value, sizeof value) == sizeof value, "the trigger");
        CHECK(write(childs, &value, sizeof value) == sizeof value, "the child's eventfd");
        CHECK(read(trigger, &value, sizeof value) == sizeof value, "the trigger");
        _exit(0);
    }
    close(childs);
}

static void prepare_moved(void)
{
    int first = MUST(eventfd(0, EFD_NONBLOCK)), flying = MUST(eventfd(0, EFD_NONBLOCK));

    moved = MUST(epoll_create1(EPOLL_CLOEXEC));
    start_child();
    watch(moved, first, EPOLLIN, FIRST);
    counter = MUST(fcntl(first, F_DUPFD_CLOEXEC, 100));
    second = MUST(eventfd(0, EFD_NONBLOCK));
    MUST(dup2(second, first));              /* another file has its number, and is watched, too */
    watch(moved, first, EPOLLIN, SECOND);
    watch(moved, flying, EPOLLIN, IN_FLIGHT);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, carrier));
    send_away(flying);
    close(flying);
    expect(moved, 0, "moved");
}

static void prepare_reported(void)
{
    edges = MUST(epoll_create1(0));
    fresh = MUST(epoll_create1(0));
    once = MUST(epoll_create1(0));
    outer = MUST(epoll_create1(0));
    MUST(pipe2(ends, O_NONBLOCK));
    MUST(pipe2(pending, O_NONBLOCK));
    MUST(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair));
    MUST(write(ends[1], "unread", 6));
    MUST(write(pending[1], "unread", 6));
    MUST(write(pair[0], "unread", 6));
    watch(edges, ends[0], EPOLLIN | EPOLLET, READER);
    watch(edges, ends[1], EPOLLOUT | EPOLLET, WRITER);
    watch(edges, pair[1], EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, SOCKET);
    expect(edges, 1 << READER | 1 << WRITER | 1 << SOCKET, "edges");
    watch(fresh, pending[0], EPOLLIN | EPOLLET, READER);
    watch(once, pair[0], EPOLLOUT | EPOLLONESHOT, ONCE);
    expect(once, 1 << ONCE, "one shot");
    watch(outer, fresh, EPOLLIN, READER);
}

static void prepare_flags(void)
{
    flags = MUST(epoll_create1(0));
    watch(flags, pair[0], EPOLLIN | EPOLLEXCLUSIVE | EPOLLET, EXCLUSIVE);
    watch(flags, pair[1], EPOLLPRI | EPOLLRDHUP | EPOLLWAKEUP, AWAKE);
    exclusive = events_of(flags, pair[0]);
    awake = events_of(flags, pair[1]);
    CHECK(exclusive == (EPOLLIN | EPOLLERR | EPOLLHUP | EPOLLEXCLUSIVE | EPOLLET), "events %#x", exclusive);
}

static void check_moved(void)
{
    struct epoll_event event;
    uint64_t value = 1;
    int flying, status;

    expect(moved, 0, "moved");
    MUST(write(counter, &value, sizeof value));
    expect(moved, 1 << FIRST, "its number is another's");
    MUST(write(second, &value, sizeof value));
    expect(moved, 1 << FIRST | 1 << SECOND, "its number was another's");
    flying = take_back();
    MUST(write(flying, &value, sizeof value));
    expect(moved, 1 << FIRST | 1 << SECOND | 1 << IN_FLIGHT, "in flight");
    MUST(write(trigger, &value, sizeof value));
    MUST(read(flying, &value, sizeof value));
    MUST(read(counter, &value, sizeof value));
    MUST(read(second, &value, sizeof value));
    CHECK(epoll_wait(moved, &event, 1, -1) == 1 && event.data.u64 == OF_CHILD, "ready is %lu", event.data.u64);
    MUST(write(trigger, &value, sizeof value));
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child: %#x", status);
    expect(moved, 0, "closed by the child");
}

static void check_reported(void)
{
    expect(outer, 1 << READER, "outer");
    expect(edges, 0, "edges that were reported");
    expect(fresh, 1 << READER, "an edge that was not reported");
    expect(fresh, 0, "an edge that was reported");
    MUST(write(ends[1], "more", 4));
    expect(edges, 1 << READER, "a new edge of the pipe");
    MUST(write(pair[0], "more", 4));
    expect(edges, 1 << SOCKET, "a new edge of the socket");
    close(pair[1]);
    expect(once, 0, "a disarmed one shot");
    MUST(epoll_ctl(once, EPOLL_CTL_MOD, pair[0],
                   &(struct epoll_event){.events = EPOLLIN | EPOLLONESHOT, .data.u64 = ONCE}));
    expect(once, 1 << ONCE, "a one shot that is armed again");
}

int main(void)
{
    prepare_moved();
    prepare_reported();
    prepare_flags();
    ready();
    wait_for_go();
    CHECK(events_of(flags, pair[0]) == exclusive, "events %#x", events_of(flags, pair[0]));
    CHECK(events_of(flags, pair[1]) == awake, "events %#x", events_of(flags, pair[1]));
    check_moved();
    check_reported();
    return 0;
}

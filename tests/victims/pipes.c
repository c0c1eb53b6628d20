/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Pipes and FIFOs with data in them, both ends in the tree: no byte may be lost, doubled or reordered, and sizes,
 * flags and closed ends stay.
 */
#include "victim.h"

#include <poll.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define BIG (300 * 1024)

static int plain[2], packets[2], large[2], ended[2], full[2], empty[2], fifo_reader, fifo_writer;
static char buffer[BIG + 4096];

static void put(int fd, size_t size, uint64_t seed)
{
    fill(buffer, size, seed);
    CHECK(write(fd, buffer, size) == (ssize_t)size, "write of %zu bytes", size);
}

static void take(int fd, size_t size, uint64_t seed, const char *what)
{
    size_t got = 0;
    ssize_t part;

    while (got < size && (part = read(fd, buffer + got, size - got)) > 0)
        got += (size_t)part;
    CHECK(got == size, "%s: %zu bytes of %zu", what, got, size);
    check_filled(buffer, size, seed, what);
}

static void check_drained(int fd, const char *what)
{
    struct pollfd one = {.fd = fd, .events = POLLIN};

    CHECK(poll(&one, 1, 0) == 0, "%s: more data than was written, or its end (%#x)", what, one.revents);
}

static void prepare(void)
{
    MUST(pipe2(plain, O_CLOEXEC));
    put(plain[1], 5000, 1);
    put(plain[1], 64, 2);
    MUST(pipe2(packets, O_DIRECT));
    for (int i = 1; i <= 3; i++)
        put(packets[1], (size_t)i * 800, (uint64_t)i + 10);
    MUST(pipe(large));
    CHECK(fcntl(large[1], F_SETPIPE_SZ, 1 << 20) >= 1 << 20 || errno == EPERM, "F_SETPIPE_SZ");
    put(large[1], fcntl(large[1], F_GETPIPE_SZ) > BIG ? BIG : 60000, 3);
    MUST(pipe(ended));
    put(ended[1], 4096, 4);
    close(ended[1]);
    MUST(pipe2(full, O_NONBLOCK));
    fill(buffer, 4096, 5);
    while (write(full[1], buffer, 4096) == 4096)
        ;
    CHECK(errno == EAGAIN, "filling a pipe");
    MUST(pipe2(empty, O_NONBLOCK));
    MUST(mkfifo("fifo", 0600));
    fifo_reader = MUST(open("fifo", O_RDONLY | O_NONBLOCK));
    fifo_writer = MUST(open("fifo", O_WRONLY));
    put(fifo_writer, 8192, 6);
}

/* holds the writing end of `plain`, and adds to it when it is told */
static pid_t start_writer(int told)
{
    pid_t child = MUST(fork());
    char byte;

    if (child != 0)
        return child;
    not_the_one_to_report();
    if (read(told, &byte, 1) != 1)
        _exit(2);
    put(plain[1], 1000, 7);
    _exit(0);
}

static void check_packets(void)
{
    for (int i = 1; i <= 3; i++) {
        ssize_t got = read(packets[0], buffer, sizeof buffer);

        CHECK(got == i * 800, "packet %d has %zd bytes", i, got);
        check_filled(buffer, (size_t)i * 800, (uint64_t)i + 10, "packet");
    }
}

static void check_full(int capacity)
{
    CHECK(fcntl(full[0], F_GETPIPE_SZ) == capacity, "capacity %d", fcntl(full[0], F_GETPIPE_SZ));
    CHECK(write(full[1], buffer, 4096) == -1 && errno == EAGAIN, "a full pipe takes more");
    for (int at = 0; at < capacity; at += 4096)
        take(full[0], 4096, 5, "full pipe");
    CHECK(read(full[0], buffer, 1) == -1 && errno == EAGAIN, "an empty pipe gives something");
}

int main(void)
{
    int capacity, large_capacity, told[2], status;
    pid_t child;

    prepare();
    capacity = fcntl(full[0], F_GETPIPE_SZ);
    large_capacity = fcntl(large[0], F_GETPIPE_SZ);
    MUST(pipe(told));
    child = start_writer(told[0]);
    close(plain[1]);
    ready();
    wait_for_go();

    take(plain[0], 5000, 1, "pipe");
    take(plain[0], 64, 2, "pipe, second write");
    check_drained(plain[0], "pipe");
    MUST(write(told[1], "w", 1));
    take(plain[0], 1000, 7, "pipe, written after the wait");
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %#x", status);
    CHECK(read(plain[0], buffer, 1) == 0, "no end of the pipe after its last writer");
    check_packets();
    take(large[0], large_capacity > BIG ? BIG : 60000, 3, "large pipe");
    CHECK(fcntl(large[0], F_GETPIPE_SZ) == large_capacity, "capacity %d", fcntl(large[0], F_GETPIPE_SZ));
    take(ended[0], 4096, 4, "pipe without a writer");
    CHECK(read(ended[0], buffer, 1) == 0, "no end of a pipe without a writer");
    check_full(capacity);
    CHECK(read(empty[0], buffer, 1) == -1 && errno == EAGAIN, "an empty pipe");
    take(fifo_reader, 8192, 6, "FIFO");
    check_drained(fifo_reader, "FIFO");
    return 0;
}

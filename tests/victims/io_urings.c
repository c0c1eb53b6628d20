/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * io_urings with nothing running: the kernel goes on where it was, completions that were not read and requests that
 * were not submitted are still there, and everything is mapped where it was. One is shared with a child, by its file
 * and its memory. An argument is the number of requests that the largest of them has had.
 */
#include "victim.h"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/wait.h>

#ifndef IORING_SETUP_NO_SQARRAY
#define IORING_SETUP_NO_SQARRAY (1u << 16)      /* since 6.6 */
#endif

struct ring {
    int fd;
    struct io_uring_params params;
    char *rings, *completions;
    struct io_uring_sqe *requests;
    unsigned width;             /* of a request, in struct io_uring_sqe */
};

static unsigned *word(const struct ring *ring, unsigned offset)
{
    return (unsigned *)(void *)(ring->rings + offset);
}

static struct ring make(unsigned entries, unsigned flags, unsigned completions)
{
    struct ring ring = { .params = { .flags = flags, .cq_entries = completions } };
    struct io_uring_params *p = &ring.params;
    size_t size;

    if (completions != 0)
        p->flags |= IORING_SETUP_CQSIZE;
    ring.fd = (int)MUST(syscall(SYS_io_uring_setup, entries, p));
    MUST(fcntl(ring.fd, F_SETFD, FD_CLOEXEC));
    ring.width = flags & IORING_SETUP_SQE128 ? 2 : 1;
    size = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe) * (flags & IORING_SETUP_CQE32 ? 2 : 1)
        + p->sq_entries * sizeof(unsigned);
    ring.rings = MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_SQ_RING));
    /* a second view, as programs of before 5.4 have */
    ring.completions = MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd, IORING_OFF_CQ_RING));
    ring.requests = MUST(mmap(NULL, p->sq_entries * sizeof *ring.requests * ring.width, PROT_READ | PROT_WRITE,
                              MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQES));
    if (!(flags & IORING_SETUP_NO_SQARRAY))
        for (unsigned i = 0; i < p->sq_entries; i++)
            word(&ring, p->sq_off.array)[i] = i;
    return ring;
}

/* Write a request, which is not submitted yet. */
static struct io_uring_sqe *request(struct ring *ring, unsigned opcode, uint64_t data)
{
    unsigned tail = *word(ring, ring->params.sq_off.tail);
    struct io_uring_sqe *sqe = &ring->requests[(tail & (ring->params.sq_entries - 1)) * ring->width];

    memset(sqe, 0, sizeof *sqe * ring->width);
    sqe->opcode = (uint8_t)opcode;
    sqe->user_data = data;
    *word(ring, ring->params.sq_off.tail) = tail + 1;
    return sqe;
}

static void submit(struct ring *ring, unsigned count)
{
    long done = syscall(SYS_io_uring_enter, ring->fd, count, count, IORING_ENTER_GETEVENTS, NULL, 0);

    CHECK(done == (long)count, "%ld of %u requests", done, count);
}

static int reap(struct ring *ring, uint64_t data)
{
    const struct io_uring_params *p = &ring->params;
    unsigned head = *word(ring, p->cq_off.head);
    size_t width = p->flags & IORING_SETUP_CQE32 ? 2 : 1;
    struct io_uring_cqe *all = (void *)(ring->completions + p->cq_off.cqes);
    struct io_uring_cqe *cqe = &all[(head & (p->cq_entries - 1)) * width];

    CHECK(head != *word(ring, p->cq_off.tail), "no completion of %lu", data);
    CHECK(cqe->user_data == data, "completion of %llu, not %lu", cqe->user_data, data);
    *word(ring, p->cq_off.head) = head + 1;
    return cqe->res;
}

static void nops(struct ring *ring, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        request(ring, IORING_OP_NOP, i);
        submit(ring, 1);
        reap(ring, i);
    }
}

/* Up to as many NOPs as the ring has room for, in one call. */
static unsigned many_nops(struct ring *ring, unsigned long wanted)
{
    unsigned count = wanted < ring->params.sq_entries ? (unsigned)wanted : ring->params.sq_entries;

    for (unsigned i = 0; i < count; i++)
        request(ring, IORING_OP_NOP, i);
    submit(ring, count);
    for (unsigned i = 0; i < count; i++)
        reap(ring, i);
    return count;
}

/* Read a pattern through the ring. */
static void read_through(struct ring *ring, int fd, uint64_t seed)
{
    char page[4096];
    struct io_uring_sqe *sqe = request(ring, IORING_OP_READ, seed);
    int got;

    sqe->fd = fd;
    sqe->addr = (uint64_t)(uintptr_t)page;
    sqe->len = sizeof page;
    submit(ring, 1);
    got = reap(ring, seed);
    CHECK(got == sizeof page, "read %d", got);
    check_filled(page, sizeof page, seed, "page of the file");
}

/* fsync(2) through the ring, which a thread of the kernel does. That thread stays. */
static void sync_through(struct ring *ring, int fd)
{
    request(ring, IORING_OP_FSYNC, 55)->fd = fd;
    submit(ring, 1);
    CHECK(reap(ring, 55) == 0, "fsync");
}

int main(int argc, char **argv)
{
    char page[4096];
    /* the last two: more words to a request and to a completion, and no indices */
    struct ring rings[] = {
        make(8, 0, 0), make(1, 0, 64), make(1024, 0, 0), make(4, IORING_SETUP_SQE128, 0),
        make(4, IORING_SETUP_CQE32, 0), make(4, 0, 0),
    };
    const size_t count = sizeof rings / sizeof *rings;
    struct ring *last = &rings[count - 1];
    int file = MUST(memfd_create("pages", MFD_CLOEXEC)), copy, pair[2], status;
    pid_t child;
    char byte;

    fill(page, sizeof page, 7);
    MUST(write(file, page, sizeof page));
    copy = MUST(dup(rings[0].fd));
    sync_through(&rings[0], file);
    nops(&rings[0], 1003);
    nops(&rings[1], 5);
    for (unsigned long left = argc > 1 ? strtoul(argv[1], NULL, 10) : 1; left > 0;)
        left -= many_nops(&rings[2], left);
    nops(&rings[3], 9);
    nops(&rings[4], 9);
    /* three completions that nobody has read, and two requests that nobody has submitted */
    for (unsigned i = 0; i < 3; i++)
        request(&rings[0], IORING_OP_NOP, 100 + i);
    submit(&rings[0], 3);
    request(&rings[0], IORING_OP_NOP, 200);
    request(&rings[0], IORING_OP_NOP, 201);
    /* two requests that the kernel drops, as their index is too large: one call for each */
    word(last, last->params.sq_off.array)[0] = word(last, last->params.sq_off.array)[1] = 4;
    for (unsigned i = 0; i < 2; i++) {
        request(last, IORING_OP_NOP, i);
        syscall(SYS_io_uring_enter, last->fd, 1, 0, 0, NULL, 0);
    }
    CHECK(*word(last, last->params.sq_off.dropped) == 2, "%u dropped", *word(last, last->params.sq_off.dropped));
    word(last, last->params.sq_off.array)[0] = 0;
    word(last, last->params.sq_off.array)[1] = 1;
    nops(last, 3);

    MUST(madvise(rings[2].requests, rings[2].params.sq_entries * sizeof *rings[2].requests, MADV_DONTFORK));
    MUST(pipe2(pair, O_CLOEXEC));
    child = MUST(fork());
    if (child == 0) {
        not_the_one_to_report();
        MUST(close(pair[1]));
        CHECK(read(pair[0], &byte, 1) == 1, "read of the parent's byte");
        read_through(&rings[0], file, 7);       /* the ring of the parent, in memory that both have */
        _exit(0);
    }
    MUST(close(pair[0]));

    ready();
    wait_for_go();

    for (unsigned i = 0; i < 3; i++)
        CHECK(reap(&rings[0], 100 + i) == 0, "result");
    submit(&rings[0], 2);
    reap(&rings[0], 200);
    reap(&rings[0], 201);
    for (size_t i = 0; i < count; i++) {
        read_through(&rings[i], file, 7);
        sync_through(&rings[i], file);
        nops(&rings[i], 10);
    }
    CHECK(*word(last, last->params.sq_off.dropped) == 2, "%u dropped", *word(last, last->params.sq_off.dropped));
    MUST(close(rings[0].fd));
    rings[0].fd = copy;
    read_through(&rings[0], file, 7);
    MUST(write(pair[1], "", 1));
    MUST(waitpid(child, &status, 0));
    CHECK(status == 0, "the child's status is %#x", status);
    nops(&rings[0], 1);
    return 0;
}

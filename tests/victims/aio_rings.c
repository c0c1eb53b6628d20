/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Contexts of asynchronous I/O with nothing running: each has its address and its room, and completions that were not
 * read are still there, also where they go over the end of the ring. With the argument "running", two requests of each
 * wait for a pipe.
 */
#include "victim.h"

#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/mman.h>


struct aio_ring {               /* fs/aio.c */
    unsigned id, nr, head, tail, magic, compat_features, incompat_features, header_length;
    struct io_event events[];
};

static const char text[] = "asynchronous";
static char got[sizeof text];
static int file;

static struct aio_ring *ring_of(aio_context_t context)
{
    return (struct aio_ring *)(uintptr_t)context;
}

static long submit(aio_context_t context, uint64_t data)
{
    struct iocb one = { .aio_data = data, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)file,
                        .aio_buf = (uintptr_t)got, .aio_nbytes = sizeof got }, *all = &one;

    return syscall(SYS_io_submit, context, 1, &all);
}

static void submit_poll(aio_context_t context, int fd)
{
    struct iocb one = { .aio_data = 77, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = (uint32_t)fd,
                        .aio_buf = POLLIN }, *all = &one;

    MUST(syscall(SYS_io_submit, context, 1, &all));
}

static void reap(aio_context_t context, uint64_t data)
{
    struct io_event event;

    MUST(syscall(SYS_io_getevents, context, 1, 1, &event, NULL));
    CHECK(event.data == data, "completion of %llu, not %lu", event.data, data);
    CHECK(event.res == sizeof text, "result %lld", event.res);
    CHECK(memcmp(got, text, sizeof text) == 0, "what was read");
}

/* As many requests as the ring has room for, but for a few that wait for other processors. */
static void fill_up(aio_context_t context, unsigned unread)
{
    unsigned count = 0;

    while (submit(context, 5000 + count) == 1)
        count++;
    CHECK(errno == EAGAIN, "io_submit");
    CHECK(unread + count < ring_of(context)->nr && unread + count > ring_of(context)->nr / 2, "%u of %u", count,
          ring_of(context)->nr);
    for (unsigned i = 0; i < count; i++)
        reap(context, 5000 + i);
}

int main(int argc, char **argv)
{
    /* requests; completions that were read, and that were not */
    static const unsigned cases[][3] = { { 1, 0, 0 }, { 10, 5, 3 }, { 100, 250, 9 }, { 2000, 700, 200 } };
    enum { COUNT = sizeof cases / sizeof *cases };
    aio_context_t contexts[COUNT] = { 0 }, gone = 0;
    unsigned sizes[COUNT];
    bool running = argc > 1 && strcmp(argv[1], "running") == 0;
    int ends[2];

    file = MUST(memfd_create("text", MFD_CLOEXEC));
    MUST(write(file, text, sizeof text));
    MUST(pipe2(ends, O_CLOEXEC));
    MUST(syscall(SYS_io_setup, 1, &gone));
    for (size_t i = 0; i < COUNT; i++) {
        MUST(syscall(SYS_io_setup, cases[i][0], &contexts[i]));
        sizes[i] = ring_of(contexts[i])->nr;
        for (unsigned n = 0; n < cases[i][1]; n++) {
            MUST(submit(contexts[i], n));
            reap(contexts[i], n);
        }
        for (unsigned n = 0; n < cases[i][2]; n++)
            MUST(submit(contexts[i], 1000 + n));
        for (unsigned n = 0; n < 2 && running; n++)
            submit_poll(contexts[i], ends[0]);
    }
    MUST(syscall(SYS_io_destroy, gone));        /* so that the numbers of the others do not begin at 0 */

    ready();
    wait_for_go();

    for (size_t i = 0; i < COUNT; i++)
        CHECK((ring_of(contexts[i])->tail + sizes[i] - ring_of(contexts[i])->head) % sizes[i] == cases[i][2],
              "head %u, tail %u", ring_of(contexts[i])->head, ring_of(contexts[i])->tail);
    if (running)
        MUST(write(ends[1], "", 1));
    for (size_t i = 0; i < COUNT; i++) {
        const struct aio_ring *ring = ring_of(contexts[i]);

        CHECK(ring->nr == sizes[i], "room for %u, not %u", ring->nr, sizes[i]);
        for (unsigned n = 0; n < cases[i][2]; n++)
            reap(contexts[i], 1000 + n);
        for (unsigned n = 0; n < 2 && running; n++) {
            struct io_event event;

            MUST(syscall(SYS_io_getevents, contexts[i], 1, 1, &event, NULL));
            CHECK(event.data == 77 && (event.res & POLLIN), "completion of %llu: %lld", event.data, event.res);
        }
        CHECK(ring->head == ring->tail, "head %u, tail %u", ring->head, ring->tail);
        for (unsigned n = 0; n < 2 * ring->nr; n++) {
            CHECK(submit(contexts[i], n) == 1, "request %u", n);
            reap(contexts[i], n);
        }
        fill_up(contexts[i], 0);
        MUST(submit(contexts[i], 7));
        MUST(syscall(SYS_io_destroy, contexts[i]));
        CHECK(submit(contexts[i], 8) == -1 && errno == EINVAL, "the context is still there");
    }
    return 0;
}

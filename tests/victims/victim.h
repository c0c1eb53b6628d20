/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What every victim written in C shares: prepare; ready(); wait_for_go(); then check with CHECK() and return 0.
 * tests/lib/victim.py is the other side of the handshake.
 */
#ifndef VICTIM_H
#define VICTIM_H

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Ends the process: a check that failed makes every later one meaningless. */
__attribute__((noreturn, format(printf, 4, 5)))
static inline void fail(const char *file, int line, const char *condition, const char *format, ...)
{
    const char *error = strerrorname_np(errno);
    va_list args;

    fprintf(stderr, "%s:%d: pid %d: %s: ", file, line, getpid(), condition);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, " (errno %s)\n", error);
    _exit(1);
}

/* CHECK(condition, "printf format", ...) says what was found where the condition does not hold. */
#define CHECK(condition, ...) do { \
    if (!(condition)) \
        fail(__FILE__, __LINE__, #condition, __VA_ARGS__); \
} while (0)

/* For what must work before there is anything to check: MUST(call) is the call's value, never -1. */
#define MUST(call) ({ \
    __typeof__(call) must_ = (call); \
    CHECK(must_ != (__typeof__(call))-1, "failed"); \
    must_; \
})

static int go_fd = -1;

/* Say that all is prepared. From here on the victim holds nothing whose other end is outside its tree. */
static inline void ready(void)
{
    const char *fd = getenv("CKPTD_VICTIM_READY"), *fifo = getenv("CKPTD_VICTIM_GO");
    int ready_fd;

    if (fd == NULL || fifo == NULL) {      /* run by hand: go at once */
        go_fd = MUST(open("/dev/zero", O_RDONLY | O_CLOEXEC));
        return;
    }
    /* read-write: the FIFO then has a writer always, and opening it neither waits nor ends in end-of-file */
    go_fd = MUST(open(fifo, O_RDWR | O_CLOEXEC));
    ready_fd = atoi(fd);
    MUST(dprintf(ready_fd, "%d\n", getpid()));
    MUST(close(ready_fd));
}

/* Forked children must let go of the handshake, or the harness would wait for their end of it. */
static inline void not_the_one_to_report(void)
{
    const char *fd = getenv("CKPTD_VICTIM_READY");

    if (fd != NULL)
        close(atoi(fd));
}

/* Blocks until the harness says go; a stray EINTR here is a failure as everywhere. */
static inline void wait_for_go(void)
{
    char byte;

    CHECK(read(go_fd, &byte, 1) == 1, "read of the go byte");
}

/* A reproducible 64-bit pattern (splitmix64, Steele et al. 2014). */
static inline uint64_t pattern(uint64_t seed, uint64_t index)
{
    uint64_t z = seed * 0x9e3779b97f4a7c15u + (index + 1) * 0xbf58476d1ce4e5b9u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static inline void fill(void *at, size_t size, uint64_t seed)
{
    uint64_t *word = at;

    for (size_t i = 0; i < size / sizeof *word; i++)
        word[i] = pattern(seed, i);
}

static inline void check_filled(const void *at, size_t size, uint64_t seed, const char *what)
{
    const uint64_t *word = at;

    for (size_t i = 0; i < size / sizeof *word; i++)
        CHECK(word[i] == pattern(seed, i), "%s: word %zu at %p is %#lx", what, i, (const void *)&word[i], word[i]);
}

static inline void check_zero(const void *at, size_t size, const char *what)
{
    const uint64_t *word = at;

    for (size_t i = 0; i < size / sizeof *word; i++)
        CHECK(word[i] == 0, "%s: word %zu is %#lx", what, i, word[i]);
}

/* A whole file of /proc, terminated, into a buffer that must be large enough. */
static inline void read_file(const char *path, char *text, size_t size)
{
    int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
    size_t used = 0;
    ssize_t got;

    while ((got = read(fd, text + used, size - used - 1)) > 0)
        used += (size_t)got;
    CHECK(got == 0 && used < size - 1, "read of %s", path);
    text[used] = '\0';
    close(fd);
}

/* The value of one "Name:\tvalue" line of /proc/self/status or the like, malloc'ed; "" where there is none. */
static inline char *status_line(const char *path, const char *name)
{
    static __thread char text[1 << 16];
    size_t length = strlen(name);
    char *line = text;

    read_file(path, text, sizeof text);
    while (line != NULL && !(strncmp(line, name, length) == 0 && line[length] == ':'))
        line = (line = strchr(line, '\n')) ? line + 1 : NULL;
    if (line == NULL)
        return strdup("");
    line += length + 1;
    line += strspn(line, " \t");
    return strndup(line, (size_t)(strchrnul(line, '\n') - line));
}

static inline double now(void)
{
    struct timespec t;

    MUST(clock_gettime(CLOCK_MONOTONIC, &t));
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static inline pid_t my_tid(void)
{
    return (pid_t)syscall(SYS_gettid);
}

/* Wait until a thread of this process is blocked in system call `number`: proc(5), /proc/PID/task/TID/syscall. */
static inline void await_blocked(pid_t tid, long number)
{
    char path[64], text[64] = "";
    double deadline = now() + 10;

    snprintf(path, sizeof path, "/proc/self/task/%d/syscall", tid);
    for (;;) {
        int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
        ssize_t got = read(fd, text, sizeof text - 1);

        close(fd);
        text[got > 0 ? got : 0] = '\0';
        if (got > 0 && text[0] != 'r' && strtol(text, NULL, 10) == number)
            return;
        CHECK(now() < deadline, "thread %d is not in system call %ld but %s", tid, number, text);
        sched_yield();
    }
}

#endif

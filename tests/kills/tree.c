/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A tree of three processes with threads, that checks itself all the time: a call that is interrupted, memory or a file
 * that changes, a number that is lost on its way from one process to another ends it with status 1. When it is told to
 * go, every thread must still run; each process then checks all that it has, and the root's status is 0.
 */
#include "victim.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define CHILDREN 2
#define TICKERS 2               /* threads of each process that sleep and wake up */
#define WAITERS 2               /* those that wait for the end */
#define MEMORY (256 << 10)
#define CONTENT 8192            /* bytes of the file */
#define PERIOD 1000000          /* nanoseconds of a ticker */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool finish;
static int waiting;
static uint64_t ticks[TICKERS], exchanged;
static uint64_t *memory;
static int seed;                /* which process this is: 0 is the root */
static int release[2];          /* its closing says to the children: check yourselves */
static int begun[2];            /* a byte of each child: all of its threads are there */
static int there[2], back[2];   /* numbers go from the first child to the second, and come back */
static __thread uint64_t own[16];

static void *tick(void *number)
{
    uint64_t *count = &ticks[(intptr_t)number], on_stack[64];
    struct timespec next;

    fill(own, sizeof own, (uint64_t)(intptr_t)number + 10);
    fill(on_stack, sizeof on_stack, (uint64_t)(intptr_t)number + 20);
    MUST(clock_gettime(CLOCK_MONOTONIC, &next));
    for (;;) {
        bool is_last;

        next.tv_nsec += PERIOD;
        if (next.tv_nsec >= 1000000000) {
            next.tv_nsec -= 1000000000;
            next.tv_sec++;
        }
        CHECK(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL) == 0, "clock_nanosleep");
        pthread_mutex_lock(&lock);
        ++*count;
        is_last = finish;
        pthread_mutex_unlock(&lock);
        check_filled(own, sizeof own, (uint64_t)(intptr_t)number + 10, "memory of a thread");
        if (is_last)
            break;
    }
    check_filled(on_stack, sizeof on_stack, (uint64_t)(intptr_t)number + 20, "stack of a thread");
    return number;
}

static void *wait_for_end(void *number)
{
    pthread_mutex_lock(&lock);
    waiting++;
    pthread_cond_broadcast(&changed);
    while (!finish)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    return number;
}

/* The first child: numbers go out in order, each when the one before has come back. */
static void *ask(void *unused)
{
    struct timespec pause = {.tv_nsec = PERIOD};
    bool is_last = false;

    for (uint64_t number = 1, answer; !is_last; number++) {
        CHECK(write(there[1], &number, sizeof number) == sizeof number, "write");
        CHECK(read(back[0], &answer, sizeof answer) == sizeof answer && answer == number, "%lu, not %lu", answer, number);
        CHECK(clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL) == 0, "clock_nanosleep");
        pthread_mutex_lock(&lock);
        exchanged = number;
        is_last = finish;
        pthread_mutex_unlock(&lock);
    }
    close(there[1]);
    return unused;
}

/* The second child. */
static void *answer(void *unused)
{
    uint64_t number, last = 0;
    ssize_t got;

    while ((got = read(there[0], &number, sizeof number)) == sizeof number) {
        CHECK(number == ++last, "%lu, not %lu", number, last);
        CHECK(write(back[1], &number, sizeof number) == sizeof number, "write");
        pthread_mutex_lock(&lock);
        exchanged = number;
        pthread_mutex_unlock(&lock);
    }
    CHECK(got == 0, "read");
    return unused;
}

static pthread_t threads[TICKERS + WAITERS + 1];
static int count;

static void begin(void *(*run)(void *), intptr_t number)
{
    CHECK(pthread_create(&threads[count++], NULL, run, (void *)number) == 0, "pthread_create");
}

static void begin_all(void)
{
    memory = MUST(mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    fill(memory, MEMORY, (uint64_t)seed);
    for (intptr_t i = 0; i < TICKERS; i++)
        begin(tick, i);
    for (intptr_t i = 0; i < WAITERS; i++)
        begin(wait_for_end, i);
    if (seed == 1)
        begin(ask, 0);
    if (seed == 2)
        begin(answer, 0);
    pthread_mutex_lock(&lock);
    while (waiting < WAITERS)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static void check_all(void)
{
    uint64_t before[TICKERS + 1];
    struct timespec pause = {.tv_nsec = PERIOD};
    double deadline = now() + 10;
    bool all = false;

    pthread_mutex_lock(&lock);
    memcpy(before, ticks, sizeof ticks);
    before[TICKERS] = exchanged;
    while (!all) {
        pthread_mutex_unlock(&lock);
        CHECK(now() < deadline, "ticks %lu and %lu after %lu and %lu, exchanged %lu after %lu", ticks[0], ticks[1], before[0],
              before[1], exchanged, before[TICKERS]);
        CHECK(nanosleep(&pause, NULL) == 0, "nanosleep");
        pthread_mutex_lock(&lock);
        all = seed != 1 || exchanged != before[TICKERS];     /* the second one may have no more to answer */
        for (int i = 0; i < TICKERS; i++)
            all = all && ticks[i] != before[i];
    }
    pthread_mutex_unlock(&lock);
    check_filled(memory, MEMORY, (uint64_t)seed, "memory");
}

static void end_all(void)
{
    pthread_mutex_lock(&lock);
    finish = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < count; i++)
        CHECK(pthread_join(threads[i], NULL) == 0, "thread %d", i);
}

static void child(void)
{
    pid_t pid = getpid(), parent = getppid();
    char byte;

    not_the_one_to_report();
    close(begun[0]);
    close(release[1]);
    close(there[seed == 1 ? 0 : 1]);
    close(back[seed == 1 ? 1 : 0]);
    begin_all();
    CHECK(write(begun[1], "b", 1) == 1, "write");
    close(begun[1]);
    CHECK(read(release[0], &byte, 1) == 0, "release");
    CHECK(getpid() == pid && getppid() == parent, "pid %d, parent %d", getpid(), getppid());
    check_all();
    end_all();
    _exit(0);
}

int main(void)
{
    static uint64_t content[CONTENT / 8], found[CONTENT / 8 + 1];
    int file = MUST(open("file", O_RDWR | O_CREAT | O_TRUNC, 0600));
    pid_t children[CHILDREN];
    ssize_t got;
    int status;
    char byte;

    fill(content, sizeof content, 99);
    CHECK(write(file, content, sizeof content) == sizeof content, "write");
    MUST(pipe(release));
    MUST(pipe(begun));
    MUST(pipe(there));
    MUST(pipe(back));
    for (int i = 0; i < CHILDREN; i++) {
        children[i] = MUST(fork());
        if (children[i] == 0) {
            seed = i + 1;
            child();
        }
    }
    for (int i = 0; i < 2; i++) {
        close(there[i]);
        close(back[i]);
    }
    close(release[0]);
    close(begun[1]);
    begin_all();
    while ((got = read(begun[0], &byte, 1)) == 1)
        ;
    CHECK(got == 0, "read");
    close(begun[0]);
    ready();
    wait_for_go();

    for (int i = 0; i < CHILDREN; i++)
        CHECK(waitpid(children[i], &status, WNOHANG) == 0, "child %d has ended with %#x", i, status);
    CHECK(pread(file, found, sizeof found, 0) == sizeof content, "the file has another size");
    CHECK(memcmp(found, content, sizeof content) == 0, "the file has another content");
    check_all();
    close(release[1]);
    for (int i = 0; i < CHILDREN; i++)
        CHECK(waitpid(children[i], &status, 0) == children[i] && status == 0, "child %d ended with %#x", i, status);
    end_all();
    return 0;
}

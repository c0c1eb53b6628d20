/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Threads blocked in system calls of every sort of restart: each must end as if nobody had stopped it, with the result
 * that it would have had, and at the time that it would have had.
 *
 * All that have a relative timeout have the same: they must end after the same time, also where part of it passed before
 * a checkpoint, and the rest after a restart a day later.
 *
 * Not here: sigtimedwait, epoll_wait, semop, msgrcv and io_getevents, which answer EINTR to any stop, by SIGSTOP too
 * (signal(7), "Interruption of system calls and library functions by stop signals").
 */
#include "victim.h"

#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/select.h>
#include <sys/wait.h>

#define SECONDS 2       /* of each, but for another argument */
#define BEFORE 1.1      /* seconds of it that pass before there can be a checkpoint */
#define SPREAD 0.9     /* at most that much apart: a call that began anew is BEFORE too late */

static int data_pipe[2], poll_pipe[2], empty_pipe[2], child_pipe[2];
static uint32_t never, later;
static volatile sig_atomic_t handled;
static volatile bool gone;      /* go was said */
static double least = 1e9, most;        /* seconds that a call with a relative timeout took */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t child;
static int seconds = SECONDS;

static void on_signal(int signal)
{
    (void)signal;
    handled++;
}

static void check_slept(double start)
{
    double slept = now() - start;

    /* the upper bound only tells a restart from the beginning, which would double the time */
    CHECK(slept >= seconds && slept < seconds * 1.9 + 10, "woke after %f s", slept);
}

static void check_slept_alike(double start)
{
    double slept = now() - start;

    check_slept(start);
    pthread_mutex_lock(&lock);
    least = slept < least ? slept : least;
    most = slept > most ? slept : most;
    pthread_mutex_unlock(&lock);
}

/* ERESTART_RESTARTBLOCK: restarted through restart_syscall(2), with the absolute time of the end */
static void in_nanosleep(void)
{
    double start = now();

    CHECK(syscall(SYS_nanosleep, &(struct timespec){seconds}, NULL) == 0, "nanosleep");
    check_slept_alike(start);
}

/* with the time that is left written by the kernel at every interruption */
static void in_nanosleep_left(void)
{
    struct timespec left = {-1, -1};
    double start = now();

    CHECK(syscall(SYS_nanosleep, &(struct timespec){seconds}, &left) == 0, "nanosleep");
    CHECK(left.tv_sec < seconds, "%ld s left", left.tv_sec);
    check_slept_alike(start);
}

static void in_clock_nanosleep(void)
{
    double start = now();

    CHECK(syscall(SYS_clock_nanosleep, CLOCK_BOOTTIME, 0, &(struct timespec){seconds}, NULL) == 0, "clock_nanosleep");
    check_slept_alike(start);
}

/* ERESTARTNOHAND: the same call again, its time is absolute anyhow */
static void in_clock_nanosleep_abs(void)
{
    double start = now();
    struct timespec end;

    MUST(clock_gettime(CLOCK_MONOTONIC, &end));
    end.tv_sec += seconds;
    CHECK(syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &end, NULL) == 0, "clock_nanosleep");
    check_slept(start);
}

static void in_poll(void)
{
    struct pollfd one = {.fd = empty_pipe[0], .events = POLLIN};
    double start = now();

    CHECK(syscall(SYS_poll, &one, 1, seconds * 1000) == 0, "poll: %#x", one.revents);
    check_slept_alike(start);
}

static void in_select(void)
{
    struct timeval timeout = {seconds, 0};
    double start = now();
    fd_set one;

    FD_ZERO(&one);
    FD_SET(empty_pipe[0], &one);
    CHECK(syscall(SYS_select, empty_pipe[0] + 1, &one, NULL, NULL, &timeout) == 0, "select");
    check_slept_alike(start);
}

static void in_ppoll(void)
{
    struct pollfd one = {.fd = empty_pipe[0], .events = POLLIN};
    struct timespec timeout = {seconds, 0};
    double start = now();
    uint64_t mask = 0;

    CHECK(syscall(SYS_ppoll, &one, 1, &timeout, &mask, sizeof mask) == 0, "ppoll: %#x", one.revents);
    check_slept_alike(start);
}

static void in_futex_timeout(void)
{
    double start = now();

    CHECK(syscall(SYS_futex, &never, FUTEX_WAIT_PRIVATE, 0, &(struct timespec){seconds}) == -1 && errno == ETIMEDOUT,
          "futex");
    check_slept_alike(start);
}

static void in_futex(void)
{
    /* who was stopped in it issues it again, and may find that the word has changed by then: futex(2), EAGAIN */
    CHECK(syscall(SYS_futex, &later, FUTEX_WAIT, 0, NULL) == 0 || (errno == EAGAIN && later == 1), "futex");
    CHECK(later == 1, "futex woke before its time");
}

static void in_read(void)
{
    char byte;

    CHECK(read(data_pipe[0], &byte, 1) == 1 && byte == 'd', "read");
}

/* poll without end, woken by data */
static void in_poll_forever(void)
{
    struct pollfd one = {.fd = poll_pipe[0], .events = POLLIN};

    CHECK(syscall(SYS_poll, &one, 1, -1) == 1 && one.revents == POLLIN, "poll: %#x", one.revents);
}

/* EINTR comes from a handler that ran, and from nothing else */
static void in_pause(void)
{
    CHECK(syscall(SYS_pause) == -1 && errno == EINTR, "pause");
    CHECK(gone && handled > 0, "pause ended before a handler ran");
}

static void in_sigsuspend(void)
{
    uint64_t mask = 0;

    CHECK(syscall(SYS_rt_sigsuspend, &mask, sizeof mask) == -1 && errno == EINTR, "sigsuspend");
    CHECK(gone && handled > 0, "sigsuspend ended before a handler ran");
}

static void in_wait4(void)
{
    int status;

    CHECK(syscall(SYS_wait4, child, &status, 0, NULL) == child, "wait4");
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 23, "status %#x", status);
}

struct call {
    const char *name;
    long number;
    void (*run)(void);
    bool wants_signal;
    pthread_t thread;
    pid_t tid;
};
static struct call calls[] = {
    {"nanosleep", SYS_nanosleep, in_nanosleep},
    {"nanosleep_left", SYS_nanosleep, in_nanosleep_left},
    {"clock_nanosleep", SYS_clock_nanosleep, in_clock_nanosleep},
    {"clock_nanosleep_abs", SYS_clock_nanosleep, in_clock_nanosleep_abs},
    {"poll", SYS_poll, in_poll},
    {"select", SYS_select, in_select},
    {"ppoll", SYS_ppoll, in_ppoll},
    {"futex_timeout", SYS_futex, in_futex_timeout},
    {"futex", SYS_futex, in_futex},
    {"poll_forever", SYS_poll, in_poll_forever},
    {"read", SYS_read, in_read},
    {"pause", SYS_pause, in_pause, true},
    {"sigsuspend", SYS_rt_sigsuspend, in_sigsuspend, true},
    {"wait4", SYS_wait4, in_wait4},
};
#define CALLS (sizeof calls / sizeof *calls)

static void *run(void *argument)
{
    struct call *call = argument;
    sigset_t mask;

    sigemptyset(&mask);
    if (call->run == in_sigsuspend)     /* let in while it waits only */
        sigaddset(&mask, SIGUSR1);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    __atomic_store_n(&call->tid, my_tid(), __ATOMIC_RELEASE);
    call->run();
    return NULL;
}

static void start_all(void)
{
    char byte;

    MUST(pipe(data_pipe));
    MUST(pipe(poll_pipe));
    MUST(pipe(empty_pipe));
    MUST(pipe(child_pipe));
    child = MUST(fork());
    if (child == 0) {
        not_the_one_to_report();
        close(child_pipe[1]);
        _exit(read(child_pipe[0], &byte, 1) == 0 ? 23 : 1);
    }
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal}, NULL);
    for (size_t i = 0; i < CALLS; i++)
        CHECK(pthread_create(&calls[i].thread, NULL, run, &calls[i]) == 0, "pthread_create");
    for (size_t i = 0; i < CALLS; i++) {
        while (__atomic_load_n(&calls[i].tid, __ATOMIC_ACQUIRE) == 0)
            sched_yield();
        await_blocked(calls[i].tid, calls[i].number);
    }
}

static void release_all(void)
{
    gone = true;
    MUST(write(data_pipe[1], "d", 1));
    MUST(write(poll_pipe[1], "d", 1));
    later = 1;
    MUST(syscall(SYS_futex, &later, FUTEX_WAKE, 1));
    close(child_pipe[1]);
    for (size_t i = 0; i < CALLS; i++)
        if (calls[i].wants_signal)
            CHECK(pthread_kill(calls[i].thread, SIGUSR1) == 0, "pthread_kill");
}

int main(int argc, char **argv)
{
    if (argc > 1)
        seconds = atoi(argv[1]);
    start_all();
    for (double start = now(); now() < start + BEFORE;)     /* what is tested is that time passes */
        usleep(10000);
    ready();
    wait_for_go();
    CHECK(handled == 0, "a handler ran before its time");
    release_all();
    for (size_t i = 0; i < CALLS; i++)
        CHECK(pthread_join(calls[i].thread, NULL) == 0, "%s", calls[i].name);
    /* a tracer that dies before it has measured them leaves some to begin anew */
            if (getenv("CKPTD_VICTIM_ROUGH") == NULL)
                CHECK(most - least < SPREAD, "calls of %d seconds took from %f to %f", seconds, least, most);
    return 0;
}

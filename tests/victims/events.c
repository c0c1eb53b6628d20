/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What event loops are made of: eventfds, epolls (level, edge, one shot, one in another, one that two processes share),
 * timerfds (running, expired, of the time of day), a signalfd with a signal that is pending.
 */
#include "victim.h"

#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

#define LARGE (1ull << 50)
#define SLACK 5.0       /* seconds that a busy machine may lose between two readings */

enum { COUNTER = 1, PIPE, WRITER, ONCE, INNER, CHILDS, TIMER };     /* what the epolls call them */

static int counter, semaphore, bell, once, ends[2], loop, inner, shared, childs;
static int running, expired, expired_often, of_day, signals;
static double left;
static struct timespec due;

static void watch(int epoll, int fd, uint32_t events, uint64_t data)
{
    MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = events, .data.u64 = LARGE | data}));
}

/* a bit for each thing that is ready */
static unsigned ready_in(int epoll)
{
    struct epoll_event found[16];
    int count = MUST(epoll_wait(epoll, found, 16, 0));
    unsigned bits = 0;

    for (int i = 0; i < count; i++) {
        CHECK(found[i].data.u64 >> 50 == 1, "data %#lx", found[i].data.u64);
        bits |= 1u << (found[i].data.u64 & 15);
    }
    return bits;
}

static uint64_t take(int fd, const char *what)
{
    uint64_t value;

    CHECK(read(fd, &value, sizeof value) == sizeof value, "read of %s", what);
    return value;
}

static void put(int fd, uint64_t value)
{
    CHECK(write(fd, &value, sizeof value) == sizeof value, "write of %lu", value);
}

static double left_of(int timer, long interval)
{
    struct itimerspec setting;

    MUST(timerfd_gettime(timer, &setting));
    CHECK(setting.it_interval.tv_sec == interval, "interval %ld", setting.it_interval.tv_sec);
    return (double)setting.it_value.tv_sec + (double)setting.it_value.tv_nsec / 1e9;
}

static int start_timer(clockid_t clock, int flags, struct timespec first, long interval)
{
    int timer = MUST(timerfd_create(clock, TFD_NONBLOCK));

    MUST(timerfd_settime(timer, flags, &(struct itimerspec){{interval, 0}, first}, NULL));
    return timer;
}

static void expire(int timer)
{
    int epoll = MUST(epoll_create1(0));
    struct epoll_event found;

    watch(epoll, timer, EPOLLIN, TIMER);
    CHECK(epoll_wait(epoll, &found, 1, -1) == 1, "a timer does not expire");
    close(epoll);
}

static void prepare_timers(void)
{
    running = start_timer(CLOCK_MONOTONIC, 0, (struct timespec){2000, 0}, 77);
    expired = start_timer(CLOCK_BOOTTIME, 0, (struct timespec){0, 1}, 0);
    expired_often = start_timer(CLOCK_MONOTONIC, 0, (struct timespec){0, 1}, 1000);
    expire(expired);
    expire(expired_often);
    MUST(clock_gettime(CLOCK_REALTIME, &due));
    due.tv_sec += 3000;
    of_day = start_timer(CLOCK_REALTIME, TFD_TIMER_ABSTIME, due, 0);
    left = left_of(running, 77);
}

static void prepare_signals(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    MUST(sigprocmask(SIG_BLOCK, &set, NULL));
    signals = MUST(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC));
    MUST(raise(SIGUSR1));
}

static void prepare(void)
{
    counter = MUST(eventfd(5, EFD_NONBLOCK));
    put(counter, LARGE);
    semaphore = MUST(eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK));
    bell = MUST(eventfd(0, 0));
    once = MUST(eventfd(1, EFD_NONBLOCK));
    MUST(pipe2(ends, O_NONBLOCK));
    MUST(write(ends[1], "before", 6));
    loop = MUST(epoll_create1(EPOLL_CLOEXEC));
    inner = MUST(epoll_create1(0));
    shared = MUST(epoll_create1(0));
    prepare_timers();
    prepare_signals();
    watch(loop, counter, EPOLLIN, COUNTER);
    watch(loop, ends[0], EPOLLIN | EPOLLET, PIPE);
    watch(loop, ends[1], EPOLLOUT, WRITER);
    watch(loop, once, EPOLLIN | EPOLLONESHOT, ONCE);
    watch(inner, expired, EPOLLIN, TIMER);
    watch(loop, inner, EPOLLIN, INNER);
    watch(shared, counter, EPOLLIN, COUNTER);
    CHECK(ready_in(loop) == (1 << COUNTER | 1 << PIPE | 1 << WRITER | 1 << ONCE | 1 << INNER), "not all is ready");
    CHECK(ready_in(loop) == (1 << COUNTER | 1 << WRITER | 1 << INNER), "edge and one shot are told of once");
}

/* has a file in the shared epoll that the parent has not, and waits for the parent */
static pid_t start_child(void)
{
    int there[2];
    pid_t child;
    char byte;

    MUST(pipe(there));
    child = MUST(fork());
    if (child != 0) {
        close(there[1]);
        CHECK(read(there[0], &byte, 1) == 1, "the child does not start");
        close(there[0]);
        return child;
    }
    not_the_one_to_report();
    childs = MUST(eventfd(0, EFD_NONBLOCK));
    watch(shared, childs, EPOLLIN, CHILDS);
    MUST(write(there[1], "t", 1));
    close(there[0]);
    close(there[1]);
    CHECK(take(bell, "the bell") == 7, "the bell rings otherwise");
    CHECK(ready_in(shared) == 0, "ready in the child: %#x", ready_in(shared));
    put(childs, 1);
    CHECK(ready_in(shared) == 1 << CHILDS, "ready in the child: %#x", ready_in(shared));
    _exit(0);
}

static void check_loop(void)
{
    unsigned found = ready_in(loop);

    /* a restored edge may be told of once more */
    CHECK((found & ~(1u << PIPE)) == (1 << COUNTER | 1 << WRITER | 1 << INNER), "ready: %#x", found);
    CHECK(ready_in(inner) == 1 << TIMER, "ready inside: %#x", ready_in(inner));
    MUST(write(ends[1], "after", 5));
    CHECK(ready_in(loop) & 1 << PIPE, "the edge is not seen");
    CHECK(!(ready_in(loop) & 1 << PIPE), "the edge is seen twice");
    MUST(epoll_ctl(loop, EPOLL_CTL_MOD, once,
                   &(struct epoll_event){.events = EPOLLIN | EPOLLONESHOT, .data.u64 = LARGE | ONCE}));
    CHECK(ready_in(loop) & 1 << ONCE, "the one shot was not armed again");
    CHECK(!(ready_in(loop) & 1 << ONCE), "the one shot goes off twice");
    MUST(epoll_ctl(loop, EPOLL_CTL_DEL, ends[1], NULL));
}

static void check_counters(void)
{
    uint64_t value;

    CHECK(take(counter, "the counter") == LARGE + 5, "the counter");
    CHECK(read(counter, &value, sizeof value) == -1 && errno == EAGAIN, "a counter that was read");
    CHECK(ready_in(loop) == 1 << INNER, "ready: %#x", ready_in(loop));
    for (int i = 0; i < 3; i++)
        CHECK(take(semaphore, "the semaphore") == 1, "the semaphore");
    CHECK(read(semaphore, &value, sizeof value) == -1 && errno == EAGAIN, "a semaphore that was taken");
}

static void check_timers(double since)
{
    struct timespec at;
    double now_left = left_of(running, 77), passed = now() - since;
    uint64_t value;

    CHECK(now_left <= left && now_left > left - passed - SLACK, "%f s left, %f before, %f passed", now_left, left,
          passed);
    CHECK(read(running, &value, sizeof value) == -1 && errno == EAGAIN, "a timer that runs");
    CHECK(take(expired, "the expired timer") == 1, "expirations");
    CHECK(left_of(expired, 0) == 0, "an expired timer runs");
    CHECK(take(expired_often, "the timer with an interval") == 1, "expirations");
    now_left = left_of(expired_often, 1000);
    CHECK(now_left > 0 && now_left <= 1000, "%f s left of an interval", now_left);
    MUST(clock_gettime(CLOCK_REALTIME, &at));
    now_left = (double)(due.tv_sec - at.tv_sec);
    CHECK(left_of(of_day, 0) < now_left + 2 && left_of(of_day, 0) > now_left - 2 - SLACK, "%f s to that time, not %f",
          left_of(of_day, 0), now_left);
}

int main(void)
{
    struct signalfd_siginfo info;
    double since;
    int status;
    pid_t child;

    prepare();
    child = start_child();
    since = now();
    ready();
    wait_for_go();
    check_loop();
    check_counters();
    check_timers(since);
    CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1, "signal %u", info.ssi_signo);
    CHECK(read(signals, &info, sizeof info) == -1 && errno == EAGAIN, "a signal that was read");
    put(bell, 7);
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %#x", status);
    return 0;
}

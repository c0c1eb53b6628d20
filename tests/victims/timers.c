/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The three interval timers and POSIX timers of several clocks and ways to notify, with a hole in their ids; one has
 * expired and its signal is pending. All must go on with the time that was left.
 */
#include "victim.h"

#include <signal.h>
#include <sys/time.h>

#define SLACK 5.0       /* seconds that a busy machine may lose between two readings */

static const int itimers[] = {ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF};
static double itimers_left[3];

struct posix_timer {
    clockid_t clock;
    int notify;
    bool armed;
    timer_t id;
    double left;
};
static struct posix_timer timers[] = {
    {CLOCK_MONOTONIC, SIGEV_SIGNAL, true}, {CLOCK_REALTIME, SIGEV_SIGNAL, true}, {CLOCK_MONOTONIC, SIGEV_NONE, true},
    {CLOCK_BOOTTIME, SIGEV_THREAD_ID, true}, {CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, true},
    {CLOCK_MONOTONIC, SIGEV_SIGNAL, false},
};
#define TIMERS ((int)(sizeof timers / sizeof *timers))

static double seconds(long whole, long fraction, double unit)
{
    return (double)whole + (double)fraction / unit;
}

static timer_t make_timer(clockid_t clock, int notify, int value)
{
    /* glibc knows SIGEV_THREAD_ID and has no name for the field before 2.41 */
    struct sigevent event = {.sigev_notify = notify, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = value,
                             ._sigev_un._tid = notify == SIGEV_THREAD_ID ? my_tid() : 0};
    timer_t id;

    MUST(timer_create(clock, &event, &id));
    return id;
}

static void arm(timer_t id, time_t first_ms, time_t every_ms)
{
    MUST(timer_settime(id, 0, &(struct itimerspec){{every_ms / 1000, every_ms % 1000 * 1000000},
                                                   {first_ms / 1000, first_ms % 1000 * 1000000}}, NULL));
}

static double left_of(const struct posix_timer *timer)
{
    struct itimerspec now_left;

    MUST(timer_gettime(timer->id, &now_left));
    CHECK(now_left.it_interval.tv_sec == (timer->armed ? 77 : 0), "interval %ld", now_left.it_interval.tv_sec);
    return seconds(now_left.it_value.tv_sec, now_left.it_value.tv_nsec, 1e9);
}

static double left_of_itimer(int which)
{
    struct itimerval now_left;

    MUST(getitimer(which, &now_left));
    CHECK(now_left.it_interval.tv_sec == 50 + which, "interval of itimer %d is %ld", which, now_left.it_interval.tv_sec);
    return seconds(now_left.it_value.tv_sec, now_left.it_value.tv_usec, 1e6);
}

static timer_t prepare(void)
{
    timer_t holes[2] = {0}, expired;

    for (int i = 0; i < 3; i++)
        MUST(setitimer(itimers[i], &(struct itimerval){{50 + itimers[i], 0}, {1000 + i, 0}}, NULL));
    holes[0] = make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0);
    for (int i = 0; i < TIMERS; i++) {
        timers[i].id = make_timer(timers[i].clock, timers[i].notify, 10 + i);
        if (timers[i].armed)
            arm(timers[i].id, (2000 + i) * 1000, 77000);
        if (i == 2)
            holes[1] = make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0);
    }
    MUST(timer_delete(holes[0]));
    MUST(timer_delete(holes[1]));
    expired = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, 99);
    arm(expired, 1, 0);
    return expired;
}

static void await_pending(int signal)
{
    sigset_t pending;

    do {
        sched_yield();
        MUST(sigpending(&pending));
    } while (!sigismember(&pending, signal));
}

/* what was left may have become less, by as much as went by and no more */
static void check_left(double before, double after, double elapsed, const char *what, int number)
{
    CHECK(after <= before && after >= before - elapsed - SLACK, "%s %d had %f s left, then %f after %f s", what, number,
          before, after, elapsed);
}

int main(void)
{
    sigset_t blocked;
    timer_t expired;
    double start, elapsed;
    siginfo_t info;

    sigfillset(&blocked);
    MUST(sigprocmask(SIG_SETMASK, &blocked, NULL));
    expired = prepare();
    await_pending(SIGRTMIN + 1);
    start = now();
    for (int i = 0; i < 3; i++)
        itimers_left[i] = left_of_itimer(itimers[i]);
    for (int i = 0; i < TIMERS; i++)
        timers[i].left = left_of(&timers[i]);
    ready();
    wait_for_go();
    elapsed = now() - start;

    for (int i = 0; i < 3; i++)
        check_left(itimers_left[i], left_of_itimer(itimers[i]), elapsed, "itimer", itimers[i]);
    for (int i = 0; i < TIMERS; i++)
        check_left(timers[i].left, left_of(&timers[i]), elapsed, "timer", i);
    CHECK(sigtimedwait(&blocked, &info, &(struct timespec){0}) == SIGRTMIN + 1, "no pending signal of a timer");
    CHECK(info.si_code == SI_TIMER && info.si_value.sival_int == 99, "code %d value %d", info.si_code,
          info.si_value.sival_int);
    CHECK(sigtimedwait(&blocked, &info, &(struct timespec){0}) == -1, "signal %d too many", info.si_signo);

    arm(expired, 1, 0);         /* the timers still work */
    CHECK(sigwaitinfo(&blocked, &info) == SIGRTMIN + 1 && info.si_value.sival_int == 99, "signal %d", info.si_signo);
    return 0;
}

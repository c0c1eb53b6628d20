/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A hundred threads (or argv[1]) with thread-local storage, names, signal masks and stacks of their own. Every third
 * one works all the time under one futex lock, the others wait in a condition variable.
 */
#include "victim.h"

#include <pthread.h>
#include <signal.h>

#define MOST 1000

struct worker {
    pthread_t thread;
    int number;
    pid_t tid;
    uint64_t rounds;
};

static __thread uint64_t tls[64];
static __thread struct worker *self;
static struct worker workers[MOST];
static int count = 100;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int started;
static bool finish;
static uint64_t total;         /* under lock: the sum of all rounds */

static void check_self(const sigset_t *mask)
{
    char name[16];
    sigset_t found;

    check_filled(tls, sizeof tls, (uint64_t)self->number, "thread-local storage");
    CHECK(my_tid() == self->tid, "tid is %d", my_tid());
    CHECK(pthread_equal(pthread_self(), self->thread), "pthread_self");
    pthread_getname_np(pthread_self(), name, sizeof name);
    CHECK(atoi(name + 1) == self->number, "name is %s", name);
    pthread_sigmask(SIG_SETMASK, NULL, &found);
    for (int signal = 1; signal < NSIG; signal++)
        CHECK(sigismember(&found, signal) == sigismember(mask, signal), "signal %d in the mask", signal);
}

static void *run(void *worker)
{
    uint64_t on_stack[128];
    char name[16];
    sigset_t mask;

    self = worker;
    self->tid = my_tid();
    fill(tls, sizeof tls, (uint64_t)self->number);
    fill(on_stack, sizeof on_stack, (uint64_t)self->number + MOST);
    snprintf(name, sizeof name, "w%d", self->number);
    pthread_setname_np(pthread_self(), name);
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN + self->number % 20);
    pthread_sigmask(SIG_BLOCK, &mask, NULL);

    pthread_mutex_lock(&lock);
    started++;
    pthread_cond_broadcast(&changed);
    while (!finish) {
        if (self->number % 3 != 0) {
            pthread_cond_wait(&changed, &lock);
            continue;
        }
        total++;
        pthread_mutex_unlock(&lock);
        self->rounds++;
        sched_yield();
        pthread_mutex_lock(&lock);
    }
    pthread_mutex_unlock(&lock);
    check_filled(on_stack, sizeof on_stack, (uint64_t)self->number + MOST, "stack of a thread");
    check_self(&mask);
    return worker;
}

int main(int argc, char **argv)
{
    uint64_t sum = 0, before;

    if (argc > 1)
        count = atoi(argv[1]);
    CHECK(count > 0 && count <= MOST, "%d threads", count);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < count; i++) {
        workers[i].number = i;
        CHECK(pthread_create(&workers[i].thread, NULL, run, &workers[i]) == 0, "thread %d", i);
    }
    while (started < count)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    ready();
    wait_for_go();

    pthread_mutex_lock(&lock);
    before = total;
    pthread_mutex_unlock(&lock);
    for (uint64_t after = before; after == before; sched_yield()) {     /* they still run */
        pthread_mutex_lock(&lock);
        after = total;
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_lock(&lock);
    finish = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < count; i++) {
        void *result;

        CHECK(pthread_join(workers[i].thread, &result) == 0 && result == &workers[i], "thread %d", i);
        sum += workers[i].rounds;
    }
    CHECK(sum == total, "%lu rounds under the lock, %lu in all", total, sum);
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Mutexes with priority inheritance, whose owner the kernel records while somebody waits: one between threads, one
 * between processes. The waiters lock again by themselves, and the kernel learns the owner from the word of the futex.
 */
#include "victim.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

struct shared {
    pthread_mutex_t mutex;
    pid_t waiter;
    int order, got;
};

static void init(struct shared *at, int pshared)
{
    pthread_mutexattr_t attributes;

    CHECK(pthread_mutexattr_init(&attributes) == 0, "attributes");
    CHECK(pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT) == 0, "protocol");
    CHECK(pthread_mutexattr_setpshared(&attributes, pshared) == 0, "pshared");
    CHECK(pthread_mutex_init(&at->mutex, &attributes) == 0, "mutex");
    CHECK(pthread_mutex_lock(&at->mutex) == 0, "lock");
}

static void lock_and_say(struct shared *at)
{
    __atomic_store_n(&at->waiter, my_tid(), __ATOMIC_SEQ_CST);
    CHECK(pthread_mutex_lock(&at->mutex) == 0, "lock of the waiter");
    at->got = ++at->order;
    CHECK(pthread_mutex_unlock(&at->mutex) == 0, "unlock of the waiter");
}

static void *thread_main(void *at)
{
    lock_and_say(at);
    return NULL;
}

static void await_waiter(struct shared *at, pid_t pid)
{
    char path[64], text[64];
    double deadline = now() + 10;

    while (__atomic_load_n(&at->waiter, __ATOMIC_SEQ_CST) == 0)
        sched_yield();
    snprintf(path, sizeof path, "/proc/%d/task/%d/syscall", pid, at->waiter);
    do {
        int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
        ssize_t got = read(fd, text, sizeof text - 1);

        close(fd);
        text[got > 0 ? got : 0] = '\0';
        CHECK(now() < deadline, "the waiter is in %s", text);
        sched_yield();
    } while (text[0] == 'r' || strtol(text, NULL, 10) != SYS_futex);
}

static void hand_over(struct shared *at)
{
    CHECK(at->got == 0, "the mutex was taken from its owner");
    at->order = 1;
    CHECK(pthread_mutex_unlock(&at->mutex) == 0, "unlock");
}

int main(void)
{
    struct shared *between = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    static struct shared within;
    pthread_t thread;
    pid_t child;
    int status;

    CHECK(between != MAP_FAILED, "mmap");
    init(&within, PTHREAD_PROCESS_PRIVATE);
    init(between, PTHREAD_PROCESS_SHARED);
    child = MUST(fork());
    if (child == 0) {
        not_the_one_to_report();
        lock_and_say(between);
        _exit(0);
    }
    CHECK(pthread_create(&thread, NULL, thread_main, &within) == 0, "pthread_create");
    await_waiter(&within, getpid());
    await_waiter(between, child);
    ready();
    wait_for_go();
    CHECK(pthread_mutex_trylock(&within.mutex) != 0, "the mutex is free");
    hand_over(&within);
    hand_over(between);
    CHECK(pthread_join(thread, NULL) == 0, "pthread_join");
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with %#x", (unsigned int)status);
    CHECK(within.got == 2 && between->got == 2, "the waiters got %d and %d", within.got, between->got);
    CHECK(pthread_mutex_lock(&within.mutex) == 0 && pthread_mutex_unlock(&within.mutex) == 0, "lock again");
    return 0;
}

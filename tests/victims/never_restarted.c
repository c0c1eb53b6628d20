/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Threads blocked in the system calls that answer EINTR to any stop, and that no kernel restarts (signal(7),
 * "Interruption of system calls and library functions by stop signals"). No handler runs, so none may see EINTR.
 * With a second argument also in epoll_wait, whose files no checkpoint takes yet: its timeout is in a register, and it ends
 * when a sleep of the same length does that began with it.
 */
#include "victim.h"

#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>

struct letter {
    long type;
    char text[8];
};

#define THREADS 7       /* the last two only if asked for */
#define SECONDS 2       /* of each, but for another argument */
#define BEFORE 1.1      /* seconds of it that pass before there can be a checkpoint */
#define SPREAD 0.9     /* at most that much apart: a call that began anew is BEFORE too late */

static int semaphores, messages;
static pid_t tids[THREADS];
static double slept[THREADS];
static int seconds = SECONDS;

static void *in_sigtimedwait(void *argument)
{
    uint64_t set = 1u << (SIGUSR1 - 1);

    (void)argument;
    __atomic_store_n(&tids[0], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_rt_sigtimedwait, &set, NULL, NULL, sizeof set) == SIGUSR1, "sigtimedwait");
    return NULL;
}

static void *in_semop(void *argument)
{
    struct sembuf down = {0, -1, 0};

    (void)argument;
    __atomic_store_n(&tids[1], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_semop, semaphores, &down, 1) == 0, "semop");
    return NULL;
}

static void *in_msgrcv(void *argument)
{
    struct letter letter;

    (void)argument;
    __atomic_store_n(&tids[2], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_msgrcv, messages, &letter, sizeof letter.text, 7L, 0) == 5, "msgrcv");
    CHECK(strcmp(letter.text, "mail") == 0, "letter");
    return NULL;
}

/* A timeout in memory may begin anew, but must come as a timeout. */
static void *in_semtimedop(void *argument)
{
    struct sembuf down = {1, -1, 0};

    (void)argument;
    __atomic_store_n(&tids[3], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_semtimedop, semaphores, &down, 1, &(struct timespec){seconds}) == -1 && errno == EAGAIN, "semtimedop");
    return NULL;
}

static void *in_epoll_wait(void *argument)
{
    int epoll = MUST(epoll_create1(EPOLL_CLOEXEC));
    struct epoll_event event;
    double start = now();

    (void)argument;
    __atomic_store_n(&tids[5], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_epoll_wait, epoll, &event, 1, seconds * 1000) == 0, "epoll_wait");
    slept[5] = now() - start;
    close(epoll);
    return NULL;
}

static void *in_epoll_pwait(void *argument)
{
    int epoll = MUST(epoll_create1(EPOLL_CLOEXEC));
    struct epoll_event event;
    double start = now();
    uint64_t mask = 0;

    (void)argument;
    __atomic_store_n(&tids[6], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_epoll_pwait, epoll, &event, 1, seconds * 1000, &mask, sizeof mask) == 0, "epoll_pwait");
    slept[6] = now() - start;
    close(epoll);
    return NULL;
}

static void *in_nanosleep(void *argument)
{
    double start = now();

    (void)argument;
    __atomic_store_n(&tids[4], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_nanosleep, &(struct timespec){seconds}, NULL) == 0, "nanosleep");
    slept[4] = now() - start;
    return NULL;
}

int main(int argc, char **argv)
{
    static void *(*const runs[])(void *) = {in_sigtimedwait, in_semop, in_msgrcv, in_semtimedop,
                                                in_nanosleep, in_epoll_wait, in_epoll_pwait};
    static const long numbers[] = {SYS_rt_sigtimedwait, SYS_semop, SYS_msgrcv, SYS_semtimedop, SYS_nanosleep,
                                   SYS_epoll_wait, SYS_epoll_pwait};
    struct sembuf up = {0, 1, 0};
    struct letter letter = {7, "mail"};
    int count = argc > 2 ? THREADS : THREADS - 2;
    pthread_t threads[THREADS];
    sigset_t mask;

    if (argc > 1)
        seconds = atoi(argv[1]);
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    semaphores = MUST(semget(IPC_PRIVATE, 2, 0600));
    messages = MUST(msgget(IPC_PRIVATE, 0600));
    for (int i = 0; i < count; i++)
        CHECK(pthread_create(&threads[i], NULL, runs[i], NULL) == 0, "pthread_create");
    for (int i = 0; i < count; i++) {
        while (__atomic_load_n(&tids[i], __ATOMIC_ACQUIRE) == 0)
            sched_yield();
        await_blocked(tids[i], numbers[i]);
    }
    for (double start = now(); now() < start + BEFORE;)     /* what is tested is that time passes */
        usleep(10000);
    ready();
    wait_for_go();
    CHECK(pthread_kill(threads[0], SIGUSR1) == 0, "pthread_kill");
    MUST(semop(semaphores, &up, 1));
    MUST(msgsnd(messages, &letter, 5, 0));
    for (int i = 0; i < count; i++)
        CHECK(pthread_join(threads[i], NULL) == 0, "pthread_join");
    for (int i = 5; i < count; i++)
        CHECK(slept[i] >= seconds && slept[i] < slept[4] + SPREAD, "call %ld took %f s, a sleep %f", numbers[i],
              slept[i], slept[4]);
    semctl(semaphores, 0, IPC_RMID);
    msgctl(messages, IPC_RMID, NULL);
    return 0;
}

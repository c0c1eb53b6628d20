/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Threads blocked in the system calls that answer EINTR to any stop, and that no kernel restarts (signal(7),
 * "Interruption of system calls and library functions by stop signals"). No handler runs, so none may see EINTR.
 */
#include "victim.h"

#include <pthread.h>
#include <signal.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>

struct letter {
    long type;
    char text[8];
};

static int semaphores, messages;
static pid_t tids[4];

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

/* A timeout may begin anew, but must come as a timeout. */
static void *in_semtimedop(void *argument)
{
    struct sembuf down = {1, -1, 0};

    (void)argument;
    __atomic_store_n(&tids[3], my_tid(), __ATOMIC_RELEASE);
    CHECK(syscall(SYS_semtimedop, semaphores, &down, 1, &(struct timespec){2}) == -1 && errno == EAGAIN, "semtimedop");
    return NULL;
}

int main(void)
{
    static void *(*const runs[])(void *) = {in_sigtimedwait, in_semop, in_msgrcv, in_semtimedop};
    static const long numbers[] = {SYS_rt_sigtimedwait, SYS_semop, SYS_msgrcv, SYS_semtimedop};
    struct sembuf up = {0, 1, 0};
    struct letter letter = {7, "mail"};
    pthread_t threads[4];
    sigset_t mask;

    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    semaphores = MUST(semget(IPC_PRIVATE, 2, 0600));
    messages = MUST(msgget(IPC_PRIVATE, 0600));
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&threads[i], NULL, runs[i], NULL) == 0, "pthread_create");
    for (int i = 0; i < 4; i++) {
        while (__atomic_load_n(&tids[i], __ATOMIC_ACQUIRE) == 0)
            sched_yield();
        await_blocked(tids[i], numbers[i]);
    }
    ready();
    wait_for_go();
    CHECK(pthread_kill(threads[0], SIGUSR1) == 0, "pthread_kill");
    MUST(semop(semaphores, &up, 1));
    MUST(msgsnd(messages, &letter, 5, 0));
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(threads[i], NULL) == 0, "pthread_join");
    semctl(semaphores, 0, IPC_RMID);
    msgctl(messages, IPC_RMID, NULL);
    return 0;
}

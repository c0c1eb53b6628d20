/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Handlers, masks, alternate stacks, and pending signals with their values: standard and real-time, sent to the
 * process and to one thread, by kill, sigqueue, tgkill and pthread_sigqueue, in their order.
 */
#include "victim.h"

#include <pthread.h>
#include <signal.h>

struct expected {
    int signal, code, value;
};

static char main_stack[65536], thread_stack[32768];
static volatile sig_atomic_t on_altstack;

static void on_signal(int signal, siginfo_t *info, void *context)
{
    char here;

    (void)signal, (void)info, (void)context;
    on_altstack = &here >= main_stack && &here < main_stack + sizeof main_stack;
}

/* sigaction of every signal as the kernel has it */
struct kernel_sigaction {
    void *handler;
    unsigned long flags;
    void *restorer;
    uint64_t mask;
};
static struct kernel_sigaction actions[NSIG];

static void read_actions(struct kernel_sigaction *into)
{
    for (int signal = 1; signal < NSIG; signal++)
        MUST(syscall(SYS_rt_sigaction, signal, NULL, &into[signal], 8ul));
}

static void set_actions(void)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK};

    sigemptyset(&action.sa_mask);
    sigaddset(&action.sa_mask, SIGTERM);
    MUST(sigaction(SIGUSR1, &action, NULL));
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESETHAND;
    sigaddset(&action.sa_mask, SIGRTMAX);
    MUST(sigaction(SIGRTMIN + 5, &action, NULL));
    MUST(sigaction(SIGCHLD, &(struct sigaction){.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDSTOP | SA_NOCLDWAIT}, NULL));
    signal(SIGHUP, SIG_IGN);
    signal(SIGRTMAX, SIG_IGN);
}

static void check_actions(void)
{
    struct kernel_sigaction found[NSIG] = {0};

    read_actions(found);
    for (int signal = 1; signal < NSIG; signal++)
        CHECK(memcmp(&found[signal], &actions[signal], sizeof *found) == 0, "action of signal %d", signal);
}

static void set_altstack(void *stack, size_t size)
{
    MUST(sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = size}, NULL));
}

static void check_altstack(void *stack, size_t size)
{
    stack_t found;

    MUST(sigaltstack(NULL, &found));
    CHECK(found.ss_sp == stack && found.ss_size == size && found.ss_flags == 0, "alternate stack %p of %zu, flags %d",
          found.ss_sp, found.ss_size, found.ss_flags);
}

/* rt_sigtimedwait itself: glibc's sigtimedwait turns SI_TKILL into SI_USER */
static int take_pending(siginfo_t *info)
{
    uint64_t all = ~0ull;

    return (int)syscall(SYS_rt_sigtimedwait, &all, info, &(struct timespec){0}, sizeof all);
}

/* Every pending signal, in the order in which the kernel gives them out: lowest number first, each number's in turn. */
static void check_pending(const struct expected *expected, size_t count, const char *whose)
{
    siginfo_t info;

    for (size_t i = 0; i < count; i++) {
        int signal = take_pending(&info);

        CHECK(signal == expected[i].signal, "%s: signal %zu is %d, not %d", whose, i, signal, expected[i].signal);
        CHECK(info.si_code == expected[i].code, "%s: code of signal %d is %d", whose, signal, info.si_code);
        CHECK(info.si_pid == getpid() && info.si_uid == getuid(), "%s: sender of signal %d is %d", whose, signal,
              info.si_pid);
        CHECK(expected[i].code != SI_QUEUE || info.si_value.sival_int == expected[i].value, "%s: value of %d is %d",
              whose, signal, info.si_value.sival_int);
    }
    CHECK(take_pending(&info) == -1 && errno == EAGAIN, "%s: signal %d too many", whose,
          info.si_signo);
}

static pthread_barrier_t prepared, checked;

static void *thread_main(void *unused)
{
    const struct expected mine[] = {{SIGTRAP, SI_TKILL, 0}, {SIGUSR2, SI_TKILL, 0}, {SIGRTMIN + 2, SI_QUEUE, 70},
                                    {SIGRTMIN + 2, SI_QUEUE, 71}, {SIGRTMIN + 3, SI_TKILL, 0}};

    set_altstack(thread_stack, sizeof thread_stack);
    pthread_barrier_wait(&prepared);
    pthread_barrier_wait(&checked);     /* the main thread has taken what was the process's */
    check_pending(mine, sizeof mine / sizeof *mine, "thread");
    check_altstack(thread_stack, sizeof thread_stack);
    return unused;
}

static void make_pending(pthread_t thread)
{
    MUST(kill(getpid(), SIGUSR1));
    MUST(kill(getpid(), SIGTERM));
    MUST(sigqueue(getpid(), SIGTRAP, (union sigval){.sival_int = 30}));
    for (int value = 40; value < 43; value++)
        MUST(sigqueue(getpid(), SIGRTMIN + 1, (union sigval){.sival_int = value}));
    MUST(sigqueue(getpid(), SIGRTMIN + 9, (union sigval){.sival_int = 50}));
    CHECK(pthread_kill(thread, SIGUSR2) == 0, "pthread_kill");
    CHECK(pthread_kill(thread, SIGTRAP) == 0, "pthread_kill");
    for (int value = 70; value < 72; value++)
        CHECK(pthread_sigqueue(thread, SIGRTMIN + 2, (union sigval){.sival_int = value}) == 0, "pthread_sigqueue");
    CHECK(pthread_kill(thread, SIGRTMIN + 3) == 0, "pthread_kill");
}

int main(void)
{
    const struct expected ours[] = {{SIGTRAP, SI_QUEUE, 30}, {SIGUSR1, SI_USER, 0}, {SIGTERM, SI_USER, 0},
                                    {SIGRTMIN + 1, SI_QUEUE, 40}, {SIGRTMIN + 1, SI_QUEUE, 41},
                                    {SIGRTMIN + 1, SI_QUEUE, 42}, {SIGRTMIN + 9, SI_QUEUE, 50}};
    sigset_t all, before, after;
    pthread_t thread;

    set_actions();
    set_altstack(main_stack, sizeof main_stack);
    sigfillset(&all);
    sigdelset(&all, SIGALRM);
    MUST(sigprocmask(SIG_SETMASK, &all, NULL));
    MUST(sigprocmask(SIG_SETMASK, NULL, &before));
    pthread_barrier_init(&prepared, NULL, 2);
    pthread_barrier_init(&checked, NULL, 2);
    CHECK(pthread_create(&thread, NULL, thread_main, NULL) == 0, "pthread_create");
    pthread_barrier_wait(&prepared);
    make_pending(thread);
    read_actions(actions);      /* after pthread_create, which sets one of its own */
    ready();
    wait_for_go();

    MUST(sigprocmask(SIG_SETMASK, NULL, &after));
    CHECK(memcmp(&before, &after, 8) == 0, "the signal mask changed");
    check_actions();
    check_altstack(main_stack, sizeof main_stack);
    check_pending(ours, sizeof ours / sizeof *ours, "process");
    pthread_barrier_wait(&checked);
    CHECK(pthread_join(thread, NULL) == 0, "pthread_join");

    sigdelset(&all, SIGUSR1);
    MUST(sigprocmask(SIG_SETMASK, &all, NULL));
    MUST(raise(SIGUSR1));
    CHECK(on_altstack, "the handler did not run on the alternate stack");
    return 0;
}

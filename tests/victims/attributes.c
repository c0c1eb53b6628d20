/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * What a process and a thread carry besides: scheduling, nice, affinity, I/O priority, limits, names, slack,
 * personality, umask, directories, and the prctl(2) settings.
 */
#include "victim.h"

#include <pthread.h>
#include <signal.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#define IOPRIO_WHO_PROCESS 1            /* <linux/ioprio.h> */
#define IOPRIO(class, level) ((class) << 13 | (level))

struct of_thread {
    char name[16];
    int policy, nice, ioprio;
    unsigned long slack;
    cpu_set_t cpus;
};
struct of_process {
    struct rlimit limits[RLIM_NLIMITS];
    mode_t mask;
    int personality, pdeathsig, subreaper, thp_disable, no_new_privs;
    char directory[4096], adj[16];
};

static struct of_thread look_at_thread(void)
{
    struct of_thread seen = {.policy = sched_getscheduler(0), .nice = getpriority(PRIO_PROCESS, 0),
                             .ioprio = (int)syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0),
                             .slack = (unsigned long)prctl(PR_GET_TIMERSLACK)};

    MUST(prctl(PR_GET_NAME, seen.name));
    MUST(sched_getaffinity(0, sizeof seen.cpus, &seen.cpus));
    return seen;
}

static struct of_process look_at_process(void)
{
    struct of_process seen = {0};

    for (int which = 0; which < (int)RLIM_NLIMITS; which++)
        MUST(getrlimit(which, &seen.limits[which]));
    seen.mask = umask(0);
    umask(seen.mask);
    seen.personality = personality(0xffffffff);
    MUST(prctl(PR_GET_PDEATHSIG, &seen.pdeathsig));
    MUST(prctl(PR_GET_CHILD_SUBREAPER, &seen.subreaper));
    seen.thp_disable = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
    seen.no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
    CHECK(getcwd(seen.directory, sizeof seen.directory) != NULL, "getcwd");
    read_file("/proc/self/oom_score_adj", seen.adj, sizeof seen.adj);
    return seen;
}

static void check_thread(const struct of_thread *before)
{
    struct of_thread after = look_at_thread();

    CHECK(strcmp(before->name, after.name) == 0, "name %s", after.name);
    CHECK(before->policy == after.policy, "policy %d", after.policy);
    CHECK(before->nice == after.nice, "nice %d", after.nice);
    CHECK(before->ioprio == after.ioprio, "I/O priority %#x", (unsigned int)after.ioprio);
    CHECK(before->slack == after.slack, "timer slack %lu", after.slack);
    CHECK(CPU_EQUAL(&before->cpus, &after.cpus), "%d processors", CPU_COUNT(&after.cpus));
}

static void check_process(const struct of_process *before)
{
    struct of_process after = look_at_process();

    for (int which = 0; which < (int)RLIM_NLIMITS; which++)
        CHECK(memcmp(&before->limits[which], &after.limits[which], sizeof *after.limits) == 0, "limit %d: %lu %lu",
              which, after.limits[which].rlim_cur, after.limits[which].rlim_max);
    CHECK(before->mask == after.mask, "umask %#o", after.mask);
    CHECK(before->personality == after.personality, "personality %#x", (unsigned int)after.personality);
    CHECK(before->pdeathsig == after.pdeathsig, "pdeathsig %d", after.pdeathsig);
    CHECK(before->subreaper == after.subreaper, "subreaper %d", after.subreaper);
    CHECK(before->thp_disable == after.thp_disable, "thp_disable %d", after.thp_disable);
    CHECK(before->no_new_privs == after.no_new_privs, "no_new_privs %d", after.no_new_privs);
    CHECK(strcmp(before->directory, after.directory) == 0, "directory %s", after.directory);
    CHECK(strcmp(before->adj, after.adj) == 0, "oom_score_adj %s", after.adj);
}

/* one processor of those that this thread may use, the last or the first one */
static void use_one_processor(bool last)
{
    cpu_set_t cpus, one;

    MUST(sched_getaffinity(0, sizeof cpus, &cpus));
    CPU_ZERO(&one);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &cpus) && (last || CPU_COUNT(&one) == 0)) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
        }
    MUST(sched_setaffinity(0, sizeof one, &one));
}

static void prepare_process(void)
{
    FILE *adj = fopen("/proc/self/oom_score_adj", "w");

    MUST(setrlimit(RLIMIT_CORE, &(struct rlimit){12345, 67890}));
    MUST(setrlimit(RLIMIT_NOFILE, &(struct rlimit){200, 300}));
    MUST(setrlimit(RLIMIT_STACK, &(struct rlimit){4 << 20, 16 << 20}));
    umask(027);
    MUST(personality(personality(0xffffffff) | ADDR_NO_RANDOMIZE));
    MUST(prctl(PR_SET_PDEATHSIG, SIGWINCH));
    MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
    MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    CHECK(adj != NULL && fprintf(adj, "321") == 3 && fclose(adj) == 0, "oom_score_adj");
    MUST(mkdir("below", 0700));
    MUST(chdir("below"));
}

static pthread_barrier_t prepared, checked;

static void *thread_main(void *unused)
{
    struct of_thread before;

    MUST(prctl(PR_SET_NAME, "a (b) c\nd"));     /* what a parser of /proc/PID/stat stumbles over */
    MUST(sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){0}));
    MUST(setpriority(PRIO_PROCESS, 0, 11));     /* of this thread alone, in Linux */
    MUST(syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO(3, 0)));
    MUST(prctl(PR_SET_TIMERSLACK, 777777));
    use_one_processor(true);
    before = look_at_thread();
    pthread_barrier_wait(&prepared);
    pthread_barrier_wait(&checked);
    check_thread(&before);
    return unused;
}

int main(void)
{
    struct of_process process;
    struct of_thread thread;
    pthread_t other;

    pthread_barrier_init(&prepared, NULL, 2);
    pthread_barrier_init(&checked, NULL, 2);
    CHECK(pthread_create(&other, NULL, thread_main, NULL) == 0, "pthread_create");
    pthread_barrier_wait(&prepared);
    MUST(prctl(PR_SET_NAME, "attributes main"));
    MUST(sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0}));
    MUST(setpriority(PRIO_PROCESS, 0, 5));
    MUST(syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO(2, 6)));
    MUST(prctl(PR_SET_TIMERSLACK, 123456));
    use_one_processor(false);
    prepare_process();
    thread = look_at_thread();
    process = look_at_process();
    ready();
    wait_for_go();
    check_thread(&thread);
    check_process(&process);
    pthread_barrier_wait(&checked);
    CHECK(pthread_join(other, NULL) == 0, "pthread_join");
    return 0;
}

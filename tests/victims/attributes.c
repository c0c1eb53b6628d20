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

/* <linux/prctl.h> and <linux/membarrier.h> of Linux 6.3 and later */
#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#define PR_GET_MEMORY_MERGE 68
#endif
#define REGISTER_PRIVATE_EXPEDITED (1 << 4)
#define GET_REGISTRATIONS (1 << 9)

#define IOPRIO_WHO_PROCESS 1            /* <linux/ioprio.h> */
#define IOPRIO(class, level) ((class) << 13 | (level))

struct of_thread {
    char name[16];
    int policy, nice, ioprio, mce_kill, store_bypass;
    unsigned long slack;
    cpu_set_t cpus;
};
struct of_process {
    struct rlimit limits[RLIM_NLIMITS];
    mode_t mask;
    int personality, pdeathsig, subreaper, thp_disable, no_new_privs, memory_merge, mdwe;
    long membarriers;
    char directory[4096], adj[16], core[16];
};

static struct of_thread look_at_thread(void)
{
    struct of_thread seen = {.policy = sched_getscheduler(0), .nice = getpriority(PRIO_PROCESS, 0),
                             .ioprio = (int)syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0),
                             .slack = (unsigned long)prctl(PR_GET_TIMERSLACK),
                             .mce_kill = prctl(PR_MCE_KILL_GET, 0, 0, 0, 0),
                             .store_bypass = prctl(PR_GET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, 0, 0, 0)};

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
    read_file("/proc/self/coredump_filter", seen.core, sizeof seen.core);
    seen.membarriers = syscall(SYS_membarrier, GET_REGISTRATIONS, 0, 0);
    seen.memory_merge = prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0);
    seen.mdwe = prctl(PR_GET_MDWE, 0, 0, 0, 0);
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
    CHECK(before->mce_kill == after.mce_kill, "machine checks %d", after.mce_kill);
    CHECK(before->store_bypass == after.store_bypass, "speculation %#x", (unsigned int)after.store_bypass);
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
    CHECK(strcmp(before->core, after.core) == 0, "coredump_filter %s", after.core);
    CHECK(before->membarriers == after.membarriers, "membarrier %#lx", (unsigned long)after.membarriers);
    CHECK(before->memory_merge == after.memory_merge, "memory merge %d", after.memory_merge);
    CHECK(before->mdwe == after.mdwe, "mdwe %d", after.mdwe);
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
    FILE *adj = fopen("/proc/self/oom_score_adj", "w"), *core = fopen("/proc/self/coredump_filter", "w");

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
    CHECK(core != NULL && fprintf(core, "0x25") == 4 && fclose(core) == 0, "coredump_filter");
    MUST(syscall(SYS_membarrier, REGISTER_PRIVATE_EXPEDITED, 0, 0));
    /* not every kernel has these; a restart is held to what there was */
    prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0);
    prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0);
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
    MUST(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
    prctl(PR_SET_SPECULATION_CTRL, PR_SPEC_STORE_BYPASS, PR_SPEC_DISABLE, 0, 0);   /* not on every machine */
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

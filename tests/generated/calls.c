/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Carries out the system calls of a program made by tests/generated/programs.py, reports what the kernel says about each
 * of its tasks, waits, and reports once more. argv[1]: the program, a line for each step:
 *
 *     NUMBER ARGUMENT...     make a system call; its result is the result of this step
 *     fork                   the steps until the matching "end" are those of a child
 *     thread                 likewise, of a thread
 *     end
 *
 * An argument is a number, or
 *
 *     $N, $N+M  the result of step N, counted from 0; with M added
 *     &N:I     32-bit word I of the output buffer of step N (pipe2(2), socketpair(2))
 *     @SIZE    a zeroed output buffer of SIZE bytes (up to 512), the only one of its step
 *     =HEX     a buffer with these bytes
 *     HHEX     likewise, which begins with the address of a signal handler (struct sigaction)
 *     THEX     likewise, with the caller's tid in word 4 (struct sigevent)
 *     OHEX     likewise, with the caller's id of the type in word 0 in word 1 (struct f_owner_ex)
 *     P, T     the caller's pid, tid
 *
 * A call that fails is part of the program like any other. Lines of the output, written when the task waits:
 * "TID before|after WHAT VALUE", and at last "TID before|after end".
 */
#include <linux/capability.h>
#include <linux/ioprio.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <signal.h>
#include "../victims/victim.h"

#define MAX_STEPS 512
#define BUFFER 512
#define REPORT (1 << 17)
/* above all fds of a program, so that RLIMIT_NOFILE and closed fds do not matter */
enum { GO = 200, OUT, FDS = 128 };

static char *steps[MAX_STEPS];
static int count;
static long results[MAX_STEPS];
static char buffers[MAX_STEPS][BUFFER];
static char inputs[MAX_STEPS][6][BUFFER];
/* the end of the pipe that says that this process is at its end; a child closes that of its parent */
static int ready_of_this = -1;

struct report {
    char text[REPORT];
    size_t used;
};

static void handler(int number) { (void)number; }

__attribute__((format(printf, 2, 3)))
static void say(struct report *report, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    report->used += (size_t)vsnprintf(report->text + report->used, REPORT - report->used, format, args);
    va_end(args);
    CHECK(report->used < REPORT, "the report is too long");
}

static void say_bytes(struct report *report, const char *moment, const char *what, long which, const void *data,
                      size_t size)
{
    say(report, "%d %s %s-%ld ", my_tid(), moment, what, which);
    for (size_t i = 0; i < size; i++)
        say(report, "%02x", ((const unsigned char *)data)[i]);
    say(report, "\n");
}

/* ------------------------------------------------------------------------------------------------- what is reported */

/* prctl(2) options that return a value, and those that store an int or a name */
static const int RETURNED[] = {
    PR_GET_DUMPABLE, PR_GET_KEEPCAPS, PR_GET_TIMING, PR_GET_SECCOMP, PR_GET_SECUREBITS, PR_GET_TIMERSLACK,
    PR_MCE_KILL_GET, PR_GET_NO_NEW_PRIVS, PR_GET_THP_DISABLE, PR_GET_IO_FLUSHER, PR_GET_TAGGED_ADDR_CTRL,
    66 /* PR_GET_MDWE */, 68 /* PR_GET_MEMORY_MERGE */,
};
static const int STORED[] = {PR_GET_PDEATHSIG, PR_GET_NAME, PR_GET_TSC, PR_GET_CHILD_SUBREAPER, PR_GET_TID_ADDRESS};
/* fcntl(2) commands without an argument: F_GETFD, F_GETFL, F_GETSIG, F_GETLEASE, F_GETPIPE_SZ, F_GET_SEALS */
static const int FLAGS[] = {1, 3, 11, 1025, 1032, 1034};
/* and those that store: F_GETOWN_EX, F_GETOWNER_UIDS, F_GET_RW_HINT, F_GET_FILE_RW_HINT */
static const int FACTS[] = {16, 17, 1035, 1037};
enum { EPIOCGPARAMS = (int)0x80088a02u };

static void report_settings(struct report *report, const char *moment)
{
    char data[64];
    int tid = my_tid();

    for (size_t i = 0; i < sizeof RETURNED / sizeof *RETURNED; i++)
        say(report, "%d %s prctl-%d %ld\n", tid, moment, RETURNED[i], syscall(SYS_prctl, RETURNED[i], 0, 0, 0, 0));
    for (size_t i = 0; i < sizeof STORED / sizeof *STORED; i++) {
        memset(data, 0, sizeof data);
        syscall(SYS_prctl, STORED[i], data, 0, 0, 0);
        say_bytes(report, moment, "prctl", STORED[i], data, 16);
    }
    for (int i = 0; i < 3; i++)
        say(report, "%d %s speculation-%d %ld\n", tid, moment, i, syscall(SYS_prctl, PR_GET_SPECULATION_CTRL, i, 0, 0, 0));
    say(report, "%d %s futex-hash %ld\n", tid, moment, syscall(SYS_prctl, 78, 2, 0, 0, 0));
    say(report, "%d %s cpuid %ld\n", tid, moment, syscall(SYS_arch_prctl, 0x1011, 0));
    say(report, "%d %s membarrier %ld\n", tid, moment, syscall(SYS_membarrier, 1 << 9, 0, 0));
    say(report, "%d %s ioprio %ld\n", tid, moment, syscall(SYS_ioprio_get, IOPRIO_WHO_PROCESS, 0));
    memset(data, 0, sizeof data);
    syscall(SYS_sched_getattr, 0, data, 56, 0);
    say_bytes(report, moment, "sched", 0, data, 56);
    memset(data, 0, sizeof data);
    syscall(SYS_get_robust_list, 0, data, data + 8);
    say_bytes(report, moment, "robust", 0, data, 16);
    memset(data, 0, sizeof data);
    syscall(SYS_get_mempolicy, data, data + 8, 256, 0, 0);
    say_bytes(report, moment, "mempolicy", 0, data, 16);
    for (int which = 0; which < 16; which++) {
        syscall(SYS_prlimit64, 0, which, 0, data);
        say_bytes(report, moment, "limit", which, data, 16);
    }
}

static void report_signals(struct report *report, const char *moment)
{
    char data[64];

    for (int number = 1; number <= 64; number++) {
        memset(data, 0, sizeof data);
        syscall(SYS_rt_sigaction, number, 0, data, 8);
        say_bytes(report, moment, "sigaction", number, data, 32);
    }
    memset(data, 0, sizeof data);
    syscall(SYS_sigaltstack, 0, data);
    say_bytes(report, moment, "sigaltstack", 0, data, 24);
    syscall(SYS_rt_sigpending, data, 8);
    say_bytes(report, moment, "sigpending", 0, data, 8);
    syscall(SYS_rt_sigprocmask, 0, 0, data, 8);
    say_bytes(report, moment, "sigprocmask", 0, data, 8);
    for (int which = 0; which < 3; which++) {
        struct itimerval timer;

        getitimer(which, &timer);
        say(report, "%d %s itimer-%d %ld.%06ld %d\n", my_tid(), moment, which, timer.it_interval.tv_sec,
            timer.it_interval.tv_usec, timer.it_value.tv_sec || timer.it_value.tv_usec);
    }
}

/* levels of getsockopt(2) with the options that say nothing about the socket, or change it, or belong to iptables:
 * of TCP the state of a repair, TCP_INFO, TCP_TIMESTAMP, TCP_CC_INFO, TCP_SAVED_SYN, TCP_ZEROCOPY_RECEIVE */
static const struct level {
    int number, options;
    unsigned char skipped[10];
} LEVELS[] = {
    {0, 64, {0}}, {41, 90, {64, 65, 68, 69}}, {6, 44, {11, 19, 20, 21, 22, 24, 26, 28, 35}}, {17, 105, {0}},
    {136, 105, {0}}, {255, 10, {0}},
};

static void report_options(struct report *report, const char *moment, int fd, const struct level *level)
{
    char what[32], data[64];

    snprintf(what, sizeof what, "fd%d-option-%d", fd, level->number);
    for (int option = 1; option < level->options; option++) {
        socklen_t size = 32;

        memset(data, 0, sizeof data);
        if (!memchr(level->skipped, option, sizeof level->skipped)
            && getsockopt(fd, level->number, option, data, &size) == 0)
            say_bytes(report, moment, what, option, data, size);
    }
}

static void report_socket(struct report *report, const char *moment, int fd)
{
    char what[32], data[128];
    socklen_t size = sizeof data;

    for (size_t i = 0; i < sizeof LEVELS / sizeof *LEVELS; i++)
        report_options(report, moment, fd, &LEVELS[i]);
    snprintf(what, sizeof what, "fd%d-name", fd);
    if (getsockname(fd, (struct sockaddr *)data, &size) == 0)
        say_bytes(report, moment, what, 0, data, size);
    size = sizeof data;
    if (getpeername(fd, (struct sockaddr *)data, &size) == 0)
        say_bytes(report, moment, what, 1, data, size);
}

static void report_terminal(struct report *report, const char *moment, int fd)
{
    /* TCGETS2, TIOCGWINSZ, TIOCGPGRP, TIOCGSID, TIOCGPTN, TIOCGPKT, TIOCGPTLCK, TIOCGEXCL, TIOCGETD */
    static const unsigned REQUESTS[] = {0x802c542a, 0x5413, 0x540f, 0x5429, 0x80045430, 0x80045438, 0x80045439,
                                        0x80045440, 0x5424};
    char what[32], data[64];

    snprintf(what, sizeof what, "fd%d-terminal", fd);
    for (size_t i = 0; i < sizeof REQUESTS / sizeof *REQUESTS; i++) {
        memset(data, 0, sizeof data);
        if (ioctl(fd, REQUESTS[i], data) == 0)
            say_bytes(report, moment, what, (long)i, data, 48);
    }
}

static void report_files(struct report *report, const char *moment)
{
    for (int fd = 3; fd < FDS; fd++) {
        char what[32], data[64];
        struct stat st;
        int events;

        if (fcntl(fd, F_GETFD) == -1)
            continue;
        /* before FIONREAD: the kernel first passes on what is on its way between the ends of a terminal */
        events = poll(&(struct pollfd){fd, POLLIN | POLLOUT | POLLPRI | POLLRDHUP, 0}, 1, 0);
        fstat(fd, &st);
        snprintf(what, sizeof what, "fd%d-fcntl", fd);
        for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++)
            say(report, "%d %s %s-%d %ld\n", my_tid(), moment, what, FLAGS[i], syscall(SYS_fcntl, fd, FLAGS[i], 0));
        for (size_t i = 0; i < sizeof FACTS / sizeof *FACTS; i++) {
            /* all anonymous files share an inode, whose hint any program of the machine may change */
            if (FACTS[i] == F_GET_RW_HINT && !(st.st_mode & S_IFMT))
                continue;
            memset(data, 0, sizeof data);
            syscall(SYS_fcntl, fd, FACTS[i], data);
            say_bytes(report, moment, what, FACTS[i], data, 8);
        }
        say(report, "%d %s fd%d-stat mode=%o links=%lu owner=%u:%u size=%ld\n", my_tid(), moment, fd, st.st_mode,
            st.st_nlink, st.st_uid, st.st_gid, st.st_size);
        say(report, "%d %s fd%d-position %ld\n", my_tid(), moment, fd, lseek(fd, 0, SEEK_CUR));
        memset(data, 0, sizeof data);
        ioctl(fd, FIONREAD, data);
        ioctl(fd, EPIOCGPARAMS, data + 8);
        say_bytes(report, moment, "ioctl", fd, data, 16);
        say(report, "%d %s fd%d-poll %d\n", my_tid(), moment, fd, events);
        snprintf(what, sizeof what, "fd%d-option", fd);
        for (int option = 1; S_ISSOCK(st.st_mode) && option < 90; option++) {
            socklen_t size = 32;
            int domain = 0, protocol = 0, locks = 0;

            memset(data, 0, sizeof data);
            getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &(socklen_t){sizeof domain});
            getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &(socklen_t){sizeof protocol});
            getsockopt(fd, SOL_SOCKET, 72 /* SO_BUF_LOCK */, &locks, &(socklen_t){sizeof locks});
            /* the size of a buffer of MPTCP that the program has not set changes with time */
            if (protocol == 262 && ((option == SO_SNDBUF && !(locks & 1)) || (option == SO_RCVBUF && !(locks & 2))))
                continue;
            /* SO_ERROR is consumed; SO_MEMINFO and SO_COOKIE count; SO_PEERPIDFD opens a file; SO_INCOMING_CPU of the
             * internet is that of the last packet */
            if ((option != 49 || domain == AF_UNIX) && option != SO_ERROR && option != 55 && option != 57 && option != 77
                && getsockopt(fd, SOL_SOCKET, option, data, &size) == 0)
                say_bytes(report, moment, what, option, data, size);
        }
        if (S_ISSOCK(st.st_mode))
            report_socket(report, moment, fd);
        if (S_ISCHR(st.st_mode))
            report_terminal(report, moment, fd);
    }
}

static void report_all(struct report *report, const char *moment)
{
    report->used = 0;
    report_settings(report, moment);
    report_signals(report, moment);
    report_files(report, moment);
    say(report, "%d %s end\n", my_tid(), moment);
    /* one write for all: the lines of several tasks do not mix */
    CHECK(write(OUT, report->text, report->used) == (ssize_t)report->used, "write of the report");
}

/* -------------------------------------------------------------------------------------------------------- the steps */

static long value_of(const char *text, int step, int position)
{
    char *buffer = inputs[step][position];
    unsigned long address = (unsigned long)handler;
    int word = my_tid();

    if (strchr("=HTO", *text) && text[1] > ' ') {
        for (size_t i = 0; text[1 + 2 * i] > ' ' && i < BUFFER; i++)
            sscanf(text + 1 + 2 * i, "%2hhx", (unsigned char *)buffer + i);
        if (*text == 'H')
            memcpy(buffer, &address, sizeof address);
        if (*text == 'T')
            memcpy(buffer + 16, &word, sizeof word);
        if (*text == 'O') {
            word = *buffer == 0 ? word : *buffer == 1 ? getpid() : getpgrp();
            memcpy(buffer + 4, &word, sizeof word);
        }
        return (long)buffer;
    }
    switch (*text) {
    case '$': return results[atoi(text + 1)] + (strchr(text, '+') ? atol(strchr(text, '+') + 1) : 0);
    case '&':
        memcpy(&word, buffers[atoi(text + 1)] + 4 * atoi(strchr(text, ':') + 1), sizeof word);
        return word;
    case '@': return (long)memset(buffers[step], 0, BUFFER);
    case 'P': return getpid();
    case 'T': return my_tid();
    case '=': return (long)buffer;
    default: return (long)strtoull(text, NULL, 0);
    }
}

static void call(int step)
{
    char line[4096], *save, *word;
    long number, arguments[6] = {0};

    snprintf(line, sizeof line, "%s", steps[step]);
    number = atol(strtok_r(line, " ", &save));
    for (int i = 0; i < 6 && (word = strtok_r(NULL, " ", &save)); i++)
        arguments[i] = value_of(word, step, i);
    results[step] = syscall(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}

static int end_of(int step)
{
    int depth = 1;

    while (depth) {
        step++;
        depth += !strcmp(steps[step], "end") ? -1 : !strcmp(steps[step], "fork") || !strcmp(steps[step], "thread");
    }
    return step;
}

struct block {
    int from, to, ready;
};

static void run(int from, int to);
__attribute__((noreturn)) static void serve(void);

/* Move an fd out of the way of those that the program gets. */
static int out_of_the_way(int fd, int at_least)
{
    int moved = MUST(fcntl(fd, F_DUPFD_CLOEXEC, at_least));

    close(fd);
    return moved;
}

static void run_block(struct block block)
{
    run(block.from, block.to);
    /* a thread may have got a table of files of its own, and the others keep this end */
    CHECK(write(block.ready, "", 1) == 1, "write");
    close(block.ready);
    serve();
}

static void *thread(void *argument)
{
    run_block(*(struct block *)argument);
    return NULL;
}

/* Start a child or a thread, and wait until it is at its end, or has died. */
static void start(int step, int end)
{
    static struct block blocks[MAX_STEPS];
    struct block *block = &blocks[step];
    int ready[2];
    char byte;

    MUST(pipe2(ready, O_CLOEXEC));
    ready[0] = out_of_the_way(ready[0], OUT + 1);
    ready[1] = out_of_the_way(ready[1], OUT + 1);
    *block = (struct block){step + 1, end, ready[1]};
    if (!strcmp(steps[step], "fork")) {
        results[step] = MUST(fork());
        if (results[step] == 0) {
            close(ready[0]);
            close(ready_of_this);
            ready_of_this = ready[1];
            run_block(*block);
        }
        close(ready[1]);
    } else {
        pthread_t id;

        if (pthread_create(&id, NULL, thread, block) != 0)
            close(ready[1]);
    }
    while (read(ready[0], &byte, 1) == -1 && errno == EINTR)
        continue;
    close(ready[0]);
}

static void run(int from, int to)
{
    for (int step = from; step < to; step++) {
        if (!strcmp(steps[step], "fork") || !strcmp(steps[step], "thread")) {
            int end = end_of(step);

            start(step, end);
            step = end;
        } else {
            call(step);
        }
    }
}

/* A byte for each task asks for a report. A task that has answered the same byte already leaves it to the others. */
static void serve(void)
{
    static __thread struct report report;
    char round, last = 0;

    for (;;) {
        if (read(GO, &round, 1) != 1)
            continue;       /* a signal */
        if (round == last) {
            MUST(write(GO, &round, 1));
            sched_yield();
            continue;
        }
        report_all(&report, round == 'b' ? "before" : "after");
        last = round;
    }
}

static void read_program(const char *path)
{
    static char text[1 << 18];
    char *save;

    read_file(path, text, sizeof text);
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        CHECK(count < MAX_STEPS, "too many steps");
        steps[count++] = line;
    }
}

int main(int argc, char **argv)
{
    int go;

    CHECK(argc == 2, "usage: calls PROGRAM");
    signal(SIGPIPE, SIG_IGN);       /* a write to a closed end is a call that fails */
    read_program(argv[1]);
    MUST(dup3(STDERR_FILENO, OUT, O_CLOEXEC));
    go = MUST(open(getenv("CKPTD_VICTIM_GO"), O_RDWR | O_CLOEXEC));
    MUST(dup3(go, GO, O_CLOEXEC));
    close(go);
    ready_of_this = out_of_the_way(atoi(getenv("CKPTD_VICTIM_READY")), OUT + 1);
    run(0, count);
    MUST(dprintf(ready_of_this, "%d\n", getpid()));
    close(ready_of_this);
    serve();
}

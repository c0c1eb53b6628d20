/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Processes whose leader has ended while a thread goes on: their parent gets the status of who ends last.
 */
#include "victim.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/wait.h>

enum { OF_LEADER = 7, OF_LAST = 9 };

static const int last_calls[] = {SYS_exit, SYS_exit_group};
static int start[2];

static void *go_on(void *call)
{
    char byte;

    CHECK(read(start[0], &byte, 1) == 1, "read");
    syscall(*(const int *)call, OF_LAST);
    return NULL;
}

static pid_t headless(int which)
{
    pid_t pid = MUST(fork());
    pthread_t thread;

    if (pid == 0) {
        not_the_one_to_report();
        MUST(close(start[1]));
        CHECK(pthread_create(&thread, NULL, go_on, (void *)&last_calls[which]) == 0, "pthread_create");
        syscall(SYS_exit, OF_LEADER);
    }
    return pid;
}

static void wait_for_its_end(pid_t leader)
{
    char path[64], line[256], state;

    snprintf(path, sizeof path, "/proc/%d/stat", leader);
    do {
        FILE *file = fopen(path, "r");

        CHECK(file != NULL && fgets(line, sizeof line, file) != NULL, "%s", path);
        fclose(file);
        state = strrchr(line, ')')[2];
        sched_yield();
    } while (state != 'Z');
}

int main(void)
{
    pid_t children[2];
    int status;

    MUST(pipe(start));
    for (int i = 0; i < 2; i++)
        children[i] = headless(i);
    for (int i = 0; i < 2; i++)
        wait_for_its_end(children[i]);
    ready();
    wait_for_go();
    for (int i = 0; i < 2; i++)
        CHECK(waitpid(children[i], &status, WNOHANG) == 0, "%d has ended already: %#x", children[i], status);
    CHECK(write(start[1], "go", 2) == 2, "write");
    for (int i = 0; i < 2; i++) {
        CHECK(waitpid(children[i], &status, 0) == children[i], "waitpid");
        CHECK(status == OF_LAST << 8, "process %d ended with %#x", i, status);
    }
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Memory that processes have since a fork: most of it the same, some changed, some gone, in a parent, two children and a
 * grandchild; and it stays the own memory of each.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/wait.h>

#define PAGES 8192
#define PAGE 4096
#define SIZE ((size_t)PAGES * PAGE)
#define CHILDREN 2

static char *heap;
static int start_pipe[2];       /* closed: go */

static char *page(int number)
{
    return heap + (size_t)number * PAGE;
}

/* Which seed a page has in process `who` (0 the parent, then the children, 3 the grandchild); 0: it is zero. */
static uint64_t seed_of(int who, int number)
{
    if (number % 1000 == 17)                    /* written by everybody after the fork */
        return 100 + (uint64_t)who;
    if (who >= 2 && number / 100 == 5)          /* a whole run, of the second child; and its child has it from there */
        return 7;
    if (who == 1 && number / 500 == 10)         /* given back by the first child */
        return 0;
    if (who == 3 && number >= PAGES - 64)       /* the end, of the grandchild */
        return 9;
    return 1;
}

static void change(int who)
{
    for (int i = 0; i < PAGES; i++) {
        uint64_t seed = seed_of(who, i);

        if (seed == 0)
            MUST(madvise(page(i), PAGE, MADV_DONTNEED));
        else if (seed != 1)
            fill(page(i), PAGE, seed * 100000 + (uint64_t)i);
    }
}

static void check(int who)
{
    char what[64];

    for (int i = 0; i < PAGES; i++) {
        uint64_t seed = seed_of(who, i);

        snprintf(what, sizeof what, "process %d, page %d", who, i);
        if (seed == 0)
            check_zero(page(i), PAGE, what);
        else
            check_filled(page(i), PAGE, seed * 100000 + (uint64_t)i, what);
    }
}

static void wait_for(pid_t pid)
{
    int status;

    MUST(waitpid(pid, &status, 0));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child %d: status %#x", pid, status);
}

/* Wait for go, check, write into every page, and see that nobody else has. */
static void live(int who, int prepared)
{
    char byte;

    close(start_pipe[1]);
    MUST(write(prepared, "p", 1));
    close(prepared);
    CHECK(read(start_pipe[0], &byte, 1) == 0, "go");
    check(who);
    for (int i = 0; i < PAGES; i++)
        *(uint64_t *)page(i) ^= (uint64_t)who + 1;
    for (int i = 0; i < PAGES; i++)
        *(uint64_t *)page(i) ^= (uint64_t)who + 1;
    check(who);
}

int main(void)
{
    pid_t children[CHILDREN];
    int prepared[2];
    char byte;

    heap = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(heap != MAP_FAILED, "mmap");
    for (int i = 0; i < PAGES; i++)
        fill(page(i), PAGE, 100000 + (uint64_t)i);
    MUST(pipe(start_pipe));
    MUST(pipe(prepared));
    for (int who = 1; who <= CHILDREN; who++) {
        children[who - 1] = MUST(fork());
        if (children[who - 1] == 0) {
            pid_t grandchild = -1;

            not_the_one_to_report();
            change(who);
            if (who == 2 && (grandchild = MUST(fork())) == 0) {
                change(3);
                live(3, prepared[1]);
                _exit(0);
            }
            live(who, prepared[1]);
            if (grandchild > 0)
                wait_for(grandchild);
            _exit(0);
        }
    }
    change(0);
    close(prepared[1]);
    for (int i = 0; i < CHILDREN + 1; i++)
        CHECK(read(prepared[0], &byte, 1) == 1, "a child is not prepared");
    close(prepared[0]);
    ready();
    wait_for_go();
    close(start_pipe[1]);
    check(0);
    for (int i = 0; i < CHILDREN; i++)
        wait_for(children[i]);
    check(0);
    return 0;
}

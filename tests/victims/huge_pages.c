/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Private memory of huge pages, in a process and its child: written, partly untouched, read-only. Without an argument a
 * machine that has no huge pages is accepted; with "must" it is not.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/wait.h>

#define SIZE (2ul << 20)

static char *memory, *constant;

static char *map(size_t pages)
{
    return mmap(NULL, pages * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
}

static void check(uint64_t seed)
{
    check_filled(memory, SIZE, seed, "the first page");
    check_zero(memory + SIZE, SIZE, "the second page");
    check_filled(constant, SIZE, 3, "the page that cannot be written");
    memory[SIZE + 7] = 1;
    CHECK(madvise(memory, SIZE, MADV_DONTNEED) == 0, "madvise");
    check_zero(memory, SIZE, "a page that was dropped");
}

int main(int argc, char **argv)
{
    int status, there[2];
    pid_t child;
    char byte;

    memory = map(2);
    if (memory == MAP_FAILED) {
        CHECK(argc < 2 || strcmp(argv[1], "must") != 0, "mmap");
        ready();
        wait_for_go();
        return 0;
    }
    constant = map(1);
    CHECK(constant != MAP_FAILED, "mmap");
    fill(memory, SIZE, 1);
    fill(constant, SIZE, 3);
    MUST(mprotect(constant, SIZE, PROT_READ));
    MUST(pipe(there));
    child = MUST(fork());
    if (child == 0) {
        not_the_one_to_report();
        close(there[1]);
        fill(memory, SIZE, 2);
        CHECK(read(there[0], &byte, 1) == 1, "read");
        check(2);
        _exit(7);
    }
    close(there[0]);
    ready();
    wait_for_go();
    check(1);
    MUST(write(there[1], "g", 1));
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7, "status %#x", status);
    return 0;
}

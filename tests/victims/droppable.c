/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Memory that the kernel may drop at any time (MAP_DROPPABLE): each page has its content or zeros afterwards, and the
 * mapping is still of that kind. A child has one of its own, beside the one of its parent, which it finds wiped.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/wait.h>

#define PAGE 4096ul
#define PAGES 8ul
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08              /* since 6.11 */
#endif

static char *inherited;

/* NULL where the kernel has no such memory */
static char *map(uint64_t seed)
{
    char *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS, -1, 0);

    if (at == MAP_FAILED) {
        CHECK(errno == EINVAL || errno == EOPNOTSUPP, "mmap");
        return NULL;
    }
    fill(at, PAGES * PAGE, seed);
    return at;
}

/* Whether VmFlags of the mapping at this address has the code. */
static bool has_flag(const char *at, const char *code)
{
    static char text[1 << 18];
    char start[32], *line, *flags, *end;

    read_file("/proc/self/smaps", text, sizeof text);
    snprintf(start, sizeof start, "%lx-", (unsigned long)at);
    line = strstr(text, start);
    CHECK(line != NULL, "no mapping begins at %p", (const void *)at);
    flags = strstr(line, "VmFlags:");
    CHECK(flags != NULL, "no flags of %p", (const void *)at);
    end = strchrnul(flags, '\n');
    *end = '\0';
    return strstr(flags, code) != NULL;
}

static void check(char *at, uint64_t seed)
{
    if (at == NULL)
        return;
    for (size_t page = 0; page < PAGES; page++) {
        uint64_t first;

        memcpy(&first, at + page * PAGE, sizeof first);
        if (first == 0)
            check_zero(at + page * PAGE, PAGE, "dropped");
        else
            for (size_t i = 0; i < PAGE / sizeof first; i++) {
                memcpy(&first, at + page * PAGE + i * sizeof first, sizeof first);
                CHECK(first == pattern(seed, page * PAGE / sizeof first + i), "word %zu of page %zu", i, page);
            }
    }
    CHECK(has_flag(at, " dp"), "the memory is ordinary");
    CHECK(mlock(at, PAGE) == -1 || !has_flag(at, " lo"), "memory that may be dropped is locked");
    fill(at, PAGES * PAGE, seed + 1);
}

int main(void)
{
    int word[2], status;
    char byte, *own;
    pid_t child;

    inherited = map(1);
    MUST(pipe(word));
    child = MUST(fork());
    if (child == 0) {
        not_the_one_to_report();
        MUST(close(word[1]));
        own = map(100);
        CHECK(read(word[0], &byte, 1) == 1, "the word of the parent");
        check(inherited, 50);           /* which wrote nothing there since the fork */
        check(own, 100);
        _exit(0);
    }
    MUST(close(word[0]));
    ready();
    wait_for_go();
    check(inherited, 1);
    CHECK(write(word[1], "g", 1) == 1, "the word to the child");
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with %#x", status);
    return 0;
}

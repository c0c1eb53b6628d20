/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Every sort of private memory, filled with patterns: content, protection, advice and the list of mappings must be
 * the same after the wait as before.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/prctl.h>

#define PAGE 4096ul
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102          /* since 6.13 */
#endif
#ifndef SYS_mseal
#define SYS_mseal 462                   /* since 6.10 */
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41           /* since 5.17 */
#define PR_SET_VMA_ANON_NAME 0
#endif

static void *map(size_t pages, int prot, int flags)
{
    return MUST(mmap(NULL, pages * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0));
}

/* a region with a pattern and then another protection or advice */
static char *filled(size_t pages, uint64_t seed)
{
    char *at = map(pages, PROT_READ | PROT_WRITE, 0);

    fill(at, pages * PAGE, seed);
    return at;
}

static char *sparse, *read_only, *no_access, *code, *zeros, *grows, *locked, *huge, *guarded;
static char *heap[64];
static char *file_private, *file_beyond;
static bool has_guards;
static int key = -1, freed_key;         /* protection keys, where the processor has them */
static char *keyed;

static const int advices[] = {MADV_DONTFORK, MADV_DONTDUMP, MADV_WIPEONFORK, MADV_NOHUGEPAGE, MADV_HUGEPAGE,
                              MADV_SEQUENTIAL, MADV_RANDOM, MADV_MERGEABLE};
#define ADVICES (sizeof advices / sizeof *advices)
static char *advised[ADVICES];

static void prepare_anonymous(void)
{
    static const unsigned char return_42[] = {0xb8, 42, 0, 0, 0, 0xc3};     /* mov $42, %eax; ret */

    sparse = map(64, PROT_READ | PROT_WRITE, 0);
    for (size_t page = 0; page < 64; page += 3)
        fill(sparse + page * PAGE, PAGE, 100 + page);
    read_only = filled(4, 2);
    MUST(mprotect(read_only, 4 * PAGE, PROT_READ));
    no_access = filled(4, 3);
    MUST(mprotect(no_access, 4 * PAGE, PROT_NONE));
    code = map(1, PROT_READ | PROT_WRITE | PROT_EXEC, 0);
    memcpy(code, return_42, sizeof return_42);
    zeros = map(8, PROT_READ | PROT_WRITE, MAP_NORESERVE);
    check_zero(zeros, 8 * PAGE, "fresh memory");        /* maps the zero page, which is no content */
    grows = map(4, PROT_READ | PROT_WRITE, MAP_GROWSDOWN);
    fill(grows, 4 * PAGE, 4);
    locked = filled(4, 5);
    MUST(mlock(locked, 4 * PAGE));
    huge = map(1024 + 512, PROT_READ | PROT_WRITE, 0);
    madvise(huge, (1024 + 512) * PAGE, MADV_HUGEPAGE);  /* EINVAL where the kernel has none */
    fill(huge, (1024 + 512) * PAGE, 6);
    /* without a neighbour of its kind, which it would be one mapping with after a restart: EEXIST where there is one */
    mmap(huge + (1024 + 512) * PAGE, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, sparse, 64 * PAGE, "a name");
}

static void prepare_advice(void)
{
    for (size_t i = 0; i < ADVICES; i++) {
        advised[i] = filled(3, 20 + i);
        madvise(advised[i], 3 * PAGE, advices[i]);      /* EINVAL where the kernel has no such advice */
    }
    guarded = filled(5, 7);
    has_guards = madvise(guarded + 2 * PAGE, PAGE, MADV_GUARD_INSTALL) == 0;
}

static void prepare_heap(void)
{
    for (size_t i = 0; i < 64; i++) {
        heap[i] = malloc((i + 1) * 1000);
        fill(heap[i], (i + 1) * 1000 / 8 * 8, 200 + i);
    }
}

/* pages 0..7 of a file: 1, 4 and 7 are changed in memory only, and a mapping that goes on beyond the file's end */
static void prepare_files(void)
{
    int fd = MUST(open("mapped", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    char page[PAGE];

    for (size_t i = 0; i < 8; i++) {
        fill(page, PAGE, 300 + i);
        CHECK(write(fd, page, PAGE) == (ssize_t)PAGE, "write");
    }
    file_private = MUST(mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    file_beyond = MUST(mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 4 * PAGE));
    close(fd);
    for (size_t i = 1; i < 8; i += 3)
        fill(file_private + i * PAGE, PAGE, 400 + i);
    fill(file_beyond, PAGE, 500);
}

/* the first key is given back, so that the second is not the lowest; a third is allocated and of no mapping */
static int idle_key;

static void prepare_keys(void)
{
    freed_key = pkey_alloc(0, 0);
    if (freed_key == -1)
        return;
    key = MUST(pkey_alloc(0, PKEY_DISABLE_WRITE));
    idle_key = MUST(pkey_alloc(0, PKEY_DISABLE_ACCESS));
    MUST(pkey_free(freed_key));
    keyed = filled(2, 8);
    MUST(pkey_mprotect(keyed, 2 * PAGE, PROT_READ | PROT_WRITE, key));
}

static void check_keys(void)
{
    if (key == -1)
        return;
    check_filled(keyed, 2 * PAGE, 8, "with a protection key");
    CHECK(pkey_get(key) == PKEY_DISABLE_WRITE, "rights of key %d: %d", key, pkey_get(key));
    CHECK(pkey_get(idle_key) == PKEY_DISABLE_ACCESS, "rights of key %d: %d", idle_key, pkey_get(idle_key));
    MUST(pkey_mprotect(keyed, PAGE, PROT_READ, idle_key));
    CHECK(pkey_mprotect(keyed, PAGE, PROT_READ, freed_key) == -1 && errno == EINVAL, "key %d is there", freed_key);
    CHECK(pkey_alloc(0, 0) == freed_key, "key %d is not the lowest free one", freed_key);
}

static char *sealed;
static bool has_seals;

static void prepare_seal(void)
{
    sealed = filled(2, 9);
    MUST(mprotect(sealed, 2 * PAGE, PROT_READ));
    has_seals = syscall(SYS_mseal, sealed, 2 * PAGE, 0) == 0;
}

static void check_seal(void)
{
    check_filled(sealed, 2 * PAGE, 9, "sealed memory");
    if (has_seals)
        CHECK(mprotect(sealed, PAGE, PROT_NONE) == -1 && errno == EPERM, "the seal is gone");
}

static void check_anonymous(void)
{
    for (size_t page = 0; page < 64; page++)
        if (page % 3 == 0)
            check_filled(sparse + page * PAGE, PAGE, 100 + page, "sparse");
        else
            check_zero(sparse + page * PAGE, PAGE, "hole of sparse");
    check_filled(read_only, 4 * PAGE, 2, "read-only");
    MUST(mprotect(no_access, 4 * PAGE, PROT_READ));
    check_filled(no_access, 4 * PAGE, 3, "no access");
    CHECK(((int (*)(void))code)() == 42, "code");
    check_zero(zeros, 8 * PAGE, "zeros");
    check_filled(grows, 4 * PAGE, 4, "grows down");
    check_filled(locked, 4 * PAGE, 5, "locked");
    check_filled(huge, (1024 + 512) * PAGE, 6, "huge");
    for (size_t i = 0; i < ADVICES; i++)
        check_filled(advised[i], 3 * PAGE, 20 + i, "advised");
}

/* Touching a guard page raises SIGSEGV; asked by a system call it is EFAULT (process_vm_readv of oneself would do too). */
static void check_guards(void)
{
    int pipe_fds[2];

    check_filled(guarded, 2 * PAGE, 7, "before the guard");
    if (!has_guards)
        return;
    MUST(pipe(pipe_fds));
    CHECK(write(pipe_fds[1], guarded + 2 * PAGE, 8) == -1 && errno == EFAULT, "a guard page can be read");
}

static void check_files(void)
{
    for (size_t i = 0; i < 8; i++)
        check_filled(file_private + i * PAGE, PAGE, (i % 3 == 1 ? 400 : 300) + i, "private file mapping");
    check_filled(file_beyond, PAGE, 500, "private file mapping, changed");
    check_filled(file_beyond + PAGE, PAGE, 305, "private file mapping, clean");
}

/* Addresses, protections and VmFlags of all mappings; sd (soft-dirty) is the kernel's own note, no state of ours. */
static void take_picture(char *out, size_t size)
{
    static char text[1 << 18];
    char *save = NULL;

    read_file("/proc/self/smaps", text, sizeof text);
    *out = '\0';
    for (char *line = strtok_r(text, "\n", &save); line != NULL; line = strtok_r(NULL, "\n", &save)) {
        bool flags = strncmp(line, "VmFlags:", 8) == 0, header = strchr(line, '-') != NULL && line[0] >= '0' &&
            strchr("0123456789abcdef", line[0]) != NULL;
        char *dirty = flags ? strstr(line, " sd") : NULL;
        size_t used = strlen(out);

        if (dirty != NULL)
            memmove(dirty, dirty + 3, strlen(dirty + 3) + 1);
        if (flags || header)
            snprintf(out + used, size - used, "%s\n", line);
    }
}

/* What is called between the two pictures may go deeper than they do, and the stack would grow by that. */
__attribute__((noinline))
static void touch_below(void)
{
    char below[1 << 15];

    fill(below, sizeof below, 10);
    check_filled(below, sizeof below, 10, "below");
}

__attribute__((noinline))
static void wait_with_a_deep_stack(void)
{
    static char before[1 << 16], after[1 << 16];
    char deep[1 << 20];
    void *end_of_heap;

    fill(deep, sizeof deep, 9);
    touch_below();
    end_of_heap = sbrk(0);
    take_picture(before, sizeof before);
    ready();
    wait_for_go();
    take_picture(after, sizeof after);
    CHECK(sbrk(0) == end_of_heap, "the heap ends at %p", sbrk(0));
    CHECK(strcmp(before, after) == 0, "mappings changed:\n%s\nto:\n%s\n", before, after);
    check_filled(deep, sizeof deep, 9, "stack");
}

int main(void)
{
    prepare_anonymous();
    prepare_advice();
    prepare_heap();
    prepare_files();
    prepare_keys();
    prepare_seal();
    wait_with_a_deep_stack();
    check_anonymous();
    check_guards();
    check_files();
    check_keys();
    check_seal();
    for (size_t i = 0; i < 64; i++)
        check_filled(heap[i], (i + 1) * 1000 / 8 * 8, 200 + i, "heap");
    return 0;
}

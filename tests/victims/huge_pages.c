/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Memory of huge pages, in a process and its child. Private: written, partly untouched, read-only. Shared: anonymous, a
 * memfd, which is also mapped privately, a System V segment. Without an argument it uses none: the machine may have
 * none, or another test needs them.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define SIZE (2ul << 20)

static char *memory, *constant, *shared, *of_memfd, *private_of_memfd, *of_segment;
static int memfd, segment;

static char *map(size_t pages)
{
    return MUST(mmap(NULL, pages * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0));
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

static char *map_memfd(size_t pages, int flags)
{
    return MUST(mmap(NULL, pages * SIZE, PROT_READ | PROT_WRITE, flags, memfd, 0));
}

/* The second page of each object stays untouched. */
static void prepare_shared(void)
{
    shared = MUST(mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0));
    fill(shared, SIZE, 4);
    memfd = MUST(memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB | MFD_ALLOW_SEALING));
    MUST(ftruncate(memfd, 2 * SIZE));
    of_memfd = map_memfd(2, MAP_SHARED);
    fill(of_memfd, SIZE, 5);
    MUST(fcntl(memfd, F_ADD_SEALS, F_SEAL_GROW));
    MUST(lseek(memfd, 16, SEEK_SET));
    private_of_memfd = map_memfd(1, MAP_PRIVATE);
    fill(private_of_memfd, SIZE, 6);
    segment = MUST(shmget(IPC_PRIVATE, SIZE + 5000, IPC_CREAT | SHM_HUGETLB | 0600));
    of_segment = MUST(shmat(segment, NULL, 0));
    fill(of_segment + SIZE, SIZE, 7);
    MUST(shmctl(segment, IPC_RMID, NULL));
}

static void check_shared(void)
{
    struct shmid_ds about;
    struct stat found;
    char word[8];

    check_filled(shared, SIZE, 4, "anonymous memory");
    check_zero(shared + SIZE, SIZE, "the second page of anonymous memory");
    check_filled(of_memfd, SIZE, 5, "the memfd");
    check_zero(of_memfd + SIZE, SIZE, "the second page of the memfd");
    CHECK(read(memfd, word, 8) == 8 && memcmp(word, of_memfd + 16, 8) == 0, "the memfd is another one");
    MUST(fstat(memfd, &found));
    CHECK(found.st_size == 2 * SIZE && found.st_blksize == SIZE, "the memfd has %ld bytes", (long)found.st_size);
    CHECK(fcntl(memfd, F_GET_SEALS) == F_SEAL_GROW, "seals %#x", fcntl(memfd, F_GET_SEALS));
    check_zero(of_segment, SIZE, "the first page of the segment");
    check_filled(of_segment + SIZE, SIZE, 7, "the segment");
    MUST(shmctl(segment, IPC_STAT, &about));
    CHECK(about.shm_segsz == SIZE + 5000, "the segment has %zu bytes", about.shm_segsz);
}

/* The child changes the shared memory; the parent sees that, and nothing of the child's private memory. */
static void change_shared(void)
{
    check_filled(private_of_memfd, SIZE, 6, "private memory of the memfd");
    private_of_memfd[0] = 0;
    shared[SIZE] = of_memfd[SIZE] = of_segment[0] = 42;
}

static void check_changed(void)
{
    check_filled(private_of_memfd, SIZE, 6, "private memory of the memfd");
    CHECK(shared[SIZE] == 42, "anonymous memory is not shared");
    CHECK(of_memfd[SIZE] == 42, "the memfd is not shared");
    CHECK(of_segment[0] == 42, "the segment is not shared");
}

int main(int argc, char **argv __attribute__((unused)))
{
    int status, there[2];
    pid_t child;
    char byte;

    if (argc < 2) {
        ready();
        wait_for_go();
        return 0;
    }
    memory = map(2);
    constant = map(1);
    fill(memory, SIZE, 1);
    fill(constant, SIZE, 3);
    MUST(mprotect(constant, SIZE, PROT_READ));
    prepare_shared();
    MUST(pipe(there));
    child = MUST(fork());
    if (child == 0) {
        not_the_one_to_report();
        close(there[1]);
        fill(memory, SIZE, 2);
        CHECK(read(there[0], &byte, 1) == 1, "read");
        check(2);
        change_shared();
        _exit(7);
    }
    close(there[0]);
    ready();
    wait_for_go();
    check(1);
    check_shared();
    MUST(write(there[1], "g", 1));
    CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7, "status %#x", status);
    check_changed();
    return 0;
}

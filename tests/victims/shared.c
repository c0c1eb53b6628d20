/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Memory that two processes share: anonymous, /dev/zero, a file, a deleted file, a memfd, System V. Content stays, and
 * a write of one is still seen by the other. Root also opens the anonymous memory as a file, and maps that.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>

#define SIZE (16 * 4096ul)
#define WORDS (SIZE / 8)

static uint64_t *anonymous, *of_zero, *private_of_zero, *of_file, *of_deleted, *of_memfd, *of_shm, *of_gone_shm, *shm_read_only;
static uint64_t *read_only_view, *private_view;
static int view = -1;
static int memfd, told[2], done[2];

static uint64_t *map_file(int fd, uint64_t seed)
{
    uint64_t *at;

    MUST(ftruncate(fd, SIZE));
    at = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    fill(at, SIZE, seed);
    return at;
}

static void prepare_zero(void)
{
    int fd = MUST(open("/dev/zero", O_RDWR));

    of_zero = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    fill(of_zero, SIZE, 7);
    private_of_zero = MUST(mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    fill(private_of_zero, SIZE, 8);
    close(fd);
}

/* Without CAP_CHECKPOINT_RESTORE nobody opens these links. */
static void prepare_views(void)
{
    char path[80];

    snprintf(path, sizeof path, "/proc/self/map_files/%lx-%lx", (unsigned long)anonymous,
             (unsigned long)anonymous + SIZE);
    view = open(path, O_RDWR | O_CLOEXEC);
    if (view == -1) {
        CHECK(errno == EPERM, "%s", path);
        return;
    }
    MUST(lseek(view, 8, SEEK_SET));
    private_view = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, view, 0));
    private_view[WORDS - 1] = 3000;
    int fd = MUST(open(path, O_RDONLY));
    read_only_view = MUST(mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0));
    close(fd);
}

static void check_views(void)
{
    uint64_t word;

    if (view == -1)
        return;
    CHECK(read(view, &word, 8) == 8 && word == anonymous[1], "the open file has another position or content");
    CHECK(private_view[WORDS - 1] == 3000, "private word %lu", private_view[WORDS - 1]);
    CHECK(private_view[0] == 1000 && read_only_view[0] == 1000, "a write is not seen by all views");
    CHECK(read_only_view[WORDS - 1] == 2000, "the child's write is not seen");
    CHECK(mprotect(read_only_view, SIZE, PROT_READ | PROT_WRITE) == -1 && errno == EACCES, "it can be written");
    word = 4000;
    CHECK(pwrite(view, &word, 8, 16) == 8 && anonymous[2] == 4000, "a write to the file is not seen");
}

static int shm_id, gone_id;

static void prepare(void)
{
    int fd;

    anonymous = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    fill(anonymous, SIZE, 1);
    prepare_views();
    prepare_zero();
    fd = MUST(open("shared", O_RDWR | O_CREAT | O_EXCL, 0600));
    of_file = map_file(fd, 2);
    close(fd);
    fd = MUST(open("deleted", O_RDWR | O_CREAT | O_EXCL, 0600));
    of_deleted = map_file(fd, 3);
    MUST(unlink("deleted"));
    close(fd);
    memfd = MUST(memfd_create("a memfd", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    of_memfd = map_file(memfd, 4);
    MUST(fcntl(memfd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK));
    shm_id = MUST(shmget(IPC_PRIVATE, SIZE, IPC_CREAT | 0640));
    of_shm = MUST(shmat(shm_id, NULL, 0));
    fill(of_shm, SIZE, 5);
    shm_read_only = MUST(shmat(shm_id, NULL, SHM_RDONLY));
    gone_id = MUST(shmget(IPC_PRIVATE, SIZE, IPC_CREAT | 0600));
    of_gone_shm = MUST(shmat(gone_id, NULL, 0));
    fill(of_gone_shm, SIZE, 6);
    MUST(shmctl(gone_id, IPC_RMID, NULL));      /* goes with its last user */
    MUST(pipe(told));
    MUST(pipe(done));
}

static uint64_t **all[] = {&anonymous, &of_file, &of_deleted, &of_memfd, &of_shm, &of_gone_shm, &of_zero};
#define ALL ((int)(sizeof all / sizeof *all))

static pid_t start_child(void)
{
    pid_t child = MUST(fork());
    char byte;

    if (child != 0)
        return child;
    not_the_one_to_report();
    if (read(told[0], &byte, 1) != 1)
        _exit(2);
    for (int i = 0; i < ALL; i++) {
        CHECK((*all[i])[0] == 1000, "object %d: the parent's write is not seen", i);
        (*all[i])[WORDS - 1] = 2000;
    }
    MUST(write(done[1], "d", 1));
    _exit(0);
}

int main(void)
{
    pid_t child;
    int status;
    char byte;

    prepare();
    child = start_child();
    ready();
    wait_for_go();
    for (int i = 0; i < ALL; i++)
        check_filled(*all[i], SIZE, (uint64_t)i + 1, "shared memory");
    check_filled(private_of_zero, SIZE, 8, "private memory of /dev/zero");
    check_zero(private_of_zero + WORDS, SIZE, "untouched memory of /dev/zero");
    check_filled(shm_read_only, SIZE, 5, "the same segment, read-only");
    for (int i = 0; i < ALL; i++)
        (*all[i])[0] = 1000;
    CHECK(shm_read_only[0] == 1000, "one segment attached twice is no longer one");
    MUST(write(told[1], "t", 1));
    CHECK(read(done[0], &byte, 1) == 1, "the child did not answer");
    for (int i = 0; i < ALL; i++)
        CHECK((*all[i])[WORDS - 1] == 2000, "object %d: the child's write is not seen", i);
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %#x", status);
    check_views();
    CHECK(fcntl(memfd, F_GET_SEALS) == (F_SEAL_GROW | F_SEAL_SHRINK), "seals %#x", fcntl(memfd, F_GET_SEALS));
    CHECK(ftruncate(memfd, 2 * SIZE) == -1 && errno == EPERM, "a sealed memfd grew");
    CHECK(pread(memfd, &byte, 1, 0) == 1, "the memfd itself");
    MUST(shmctl(shm_id, IPC_RMID, NULL));
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Memory that two processes share: anonymous, a file, a deleted file, a memfd, System V. Content stays, and a write of
 * one is still seen by the other.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>

#define SIZE (16 * 4096ul)
#define WORDS (SIZE / 8)

static uint64_t *anonymous, *of_file, *of_deleted, *of_memfd, *of_shm, *of_gone_shm, *shm_read_only;
static int memfd, told[2], done[2];

static uint64_t *map_file(int fd, uint64_t seed)
{
    uint64_t *at;

    MUST(ftruncate(fd, SIZE));
    at = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    fill(at, SIZE, seed);
    return at;
}

static int shm_id, gone_id;

static void prepare(void)
{
    int fd;

    anonymous = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    fill(anonymous, SIZE, 1);
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

static uint64_t **all[] = {&anonymous, &of_file, &of_deleted, &of_memfd, &of_shm, &of_gone_shm};
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
    check_filled(shm_read_only, SIZE, 5, "the same segment, read-only");
    for (int i = 0; i < ALL; i++)
        (*all[i])[0] = 1000;
    CHECK(shm_read_only[0] == 1000, "one segment attached twice is no longer one");
    MUST(write(told[1], "t", 1));
    CHECK(read(done[0], &byte, 1) == 1, "the child did not answer");
    for (int i = 0; i < ALL; i++)
        CHECK((*all[i])[WORDS - 1] == 2000, "object %d: the child's write is not seen", i);
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %#x", status);
    CHECK(fcntl(memfd, F_GET_SEALS) == (F_SEAL_GROW | F_SEAL_SHRINK), "seals %#x", fcntl(memfd, F_GET_SEALS));
    CHECK(ftruncate(memfd, 2 * SIZE) == -1 && errno == EPERM, "a sealed memfd grew");
    CHECK(pread(memfd, &byte, 1, 0) == 1, "the memfd itself");
    MUST(shmctl(shm_id, IPC_RMID, NULL));
    return 0;
}

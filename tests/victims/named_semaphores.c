/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Named semaphores. glibc's sem_open(3) leaves their creator with a mapping of a temporary name that is deleted. Others
 * open the real name, before the checkpoint or afterwards: all have one semaphore.
 */
#include "victim.h"

#include <semaphore.h>
#include <sys/mman.h>

static char names[2][64];

static sem_t *create(int number)
{
    sem_t *made;

    snprintf(names[number], sizeof names[number], "/ckptd-victim-%d-%d", getpid(), number);
    made = sem_open(names[number], O_CREAT | O_EXCL, 0600, 1);
    CHECK(made != SEM_FAILED, "sem_open");
    return made;
}

/* In one process sem_open(3) would return the mapping that it has. */
static sem_t *open_again(int number)
{
    char path[96];
    int fd;
    sem_t *at;

    snprintf(path, sizeof path, "/dev/shm/sem.%s", names[number] + 1);
    fd = MUST(open(path, O_RDWR | O_CLOEXEC));
    at = mmap(NULL, sizeof(sem_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(at != MAP_FAILED, "mmap");
    close(fd);
    return at;
}

static void check_excludes(sem_t *one, sem_t *other, const char *what)
{
    CHECK(sem_trywait(one) == 0, "%s: it is not free", what);
    CHECK(sem_trywait(other) == -1 && errno == EAGAIN, "%s: the other one is free", what);
    CHECK(sem_post(other) == 0 && sem_trywait(one) == 0, "%s: a post of the other does not free it", what);
    CHECK(sem_post(one) == 0, "%s: sem_post", what);
}

int main(void)
{
    sem_t *alone = create(0), *creators = create(1), *openers = open_again(1);

    ready();
    wait_for_go();
    check_excludes(creators, openers, "opened before");
    check_excludes(alone, open_again(0), "opened afterwards");
    MUST(sem_unlink(names[0]));
    MUST(sem_unlink(names[1]));
    return 0;
}

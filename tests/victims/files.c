/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Open files: positions, flags, close-on-exec, descriptions shared by dup and fork or opened twice, deleted files with
 * their content, sparse files, directories, the character devices that have no state.
 */
#include "victim.h"

#include <dirent.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define MOST 64

struct picture {
    int flags, fd_flags;
    off_t position;
    dev_t device;
    ino_t inode;
    mode_t mode;
};
static struct picture pictures[600];
static int fds[MOST], count;
static int first, duplicate, second, deleted, sparse, directory, high, append;
static int to_child[2], from_child[2];

static struct picture look(int fd)
{
    struct stat status;
    struct picture seen = {.flags = MUST(fcntl(fd, F_GETFL)), .fd_flags = MUST(fcntl(fd, F_GETFD))};

    MUST(fstat(fd, &status));
    seen.position = lseek(fd, 0, SEEK_CUR);     /* -1 for what has no position, and that is part of the picture */
    seen.device = status.st_dev;
    seen.inode = status.st_ino;
    seen.mode = status.st_mode;
    return seen;
}

static int keep(int fd)
{
    fds[count++] = fd;
    return fd;
}

static int open_at(const char *path, int flags, off_t position)
{
    int fd = keep(MUST(open(path, flags, 0640)));

    if (position != 0)
        MUST(lseek(fd, position, SEEK_SET));
    return fd;
}

static void write_pattern(int fd, size_t size, uint64_t seed)
{
    uint64_t *words = malloc(size);

    fill(words, size, seed);
    CHECK(write(fd, words, size) == (ssize_t)size, "write");
    free(words);
}

static void check_content(int fd, off_t at, size_t size, uint64_t seed, const char *what)
{
    uint64_t *words = malloc(size);

    CHECK(pread(fd, words, size, at) == (ssize_t)size, "%s: too short", what);
    check_filled(words, size, seed, what);
    free(words);
}

static void prepare(void)
{
    char name[16];
    int extra;

    first = open_at("data", O_RDWR | O_CREAT, 0);
    write_pattern(first, 20000, 1);
    MUST(lseek(first, 123, SEEK_SET));
    duplicate = keep(MUST(fcntl(first, F_DUPFD_CLOEXEC, 40)));
    second = open_at("data", O_RDONLY | O_CLOEXEC, 77);
    append = open_at("log", O_WRONLY | O_CREAT | O_APPEND | O_SYNC, 0);
    MUST(write(append, "before\n", 7));
    deleted = open_at("gone", O_RDWR | O_CREAT, 0);
    write_pattern(deleted, 300000, 2);
    MUST(lseek(deleted, 4097, SEEK_SET));
    MUST(unlink("gone"));
    sparse = open_at("gone", O_RDWR | O_CREAT, 0);      /* deleted, mostly holes, and of the same old name */
    MUST(ftruncate(sparse, 100 << 20));
    MUST(lseek(sparse, 50 << 20, SEEK_SET));
    write_pattern(sparse, 8192, 3);
    MUST(unlink("gone"));
    high = keep(MUST(dup2(second, 500)));
    MUST(mkdir("directory", 0755));
    for (int i = 0; i < 10; i++) {
        snprintf(name, sizeof name, "directory/%d", i);
        extra = MUST(open(name, O_WRONLY | O_CREAT, 0600));
        close(extra);
    }
    directory = open_at("directory", O_RDONLY | O_DIRECTORY, 0);
    open_at("/dev/null", O_WRONLY | O_APPEND, 0);
    open_at("/dev/zero", O_RDONLY | O_NONBLOCK, 0);
    open_at("/dev/full", O_RDWR, 0);
    open_at("/dev/random", O_RDONLY, 0);
    open_at("/dev/urandom", O_RDONLY | O_CLOEXEC, 0);
}

static pid_t start_child(void)
{
    pid_t child;
    char byte;

    MUST(pipe(to_child));
    MUST(pipe(from_child));
    child = MUST(fork());
    if (child != 0)
        return child;
    not_the_one_to_report();
    close(to_child[1]);
    if (read(to_child[0], &byte, 1) != 1)
        _exit(2);
    /* the descriptions are the parent's: what it moved has moved here */
    CHECK(lseek(first, 0, SEEK_CUR) == 1000, "position is %ld", lseek(first, 0, SEEK_CUR));
    CHECK(lseek(second, 0, SEEK_CUR) == 77, "position is %ld", lseek(second, 0, SEEK_CUR));
    check_content(deleted, 0, 300000, 2, "deleted file in the child");
    MUST(lseek(high, 2000, SEEK_SET));
    MUST(write(from_child[1], &byte, 1));
    _exit(0);
}

static void check_all(void)
{
    struct stat status;
    char line[32];

    for (int i = 0; i < count; i++) {
        struct picture seen = look(fds[i]), *before = &pictures[fds[i]];

        CHECK(seen.flags == before->flags, "fd %d: flags %#o, not %#o", fds[i], seen.flags, before->flags);
        CHECK(seen.fd_flags == before->fd_flags, "fd %d: close-on-exec %d", fds[i], seen.fd_flags);
        CHECK(seen.position == before->position, "fd %d: position %ld", fds[i], seen.position);
        CHECK(seen.mode == before->mode, "fd %d: mode %#o", fds[i], seen.mode);
    }
    check_content(first, 0, 20000, 1, "file");
    check_content(deleted, 0, 300000, 2, "deleted file");
    check_content(sparse, 50 << 20, 8192, 3, "sparse file");
    MUST(fstat(sparse, &status));
    CHECK(status.st_size == 100 << 20 && status.st_nlink == 0, "%ld bytes, %lu links", status.st_size, status.st_nlink);
    CHECK(status.st_blocks < 2048, "the holes of the sparse file were filled: %ld blocks", status.st_blocks);
    MUST(write(append, "after\n", 6));
    CHECK(pread(MUST(open("log", O_RDONLY)), line, sizeof line, 0) == 13 && memcmp(line, "before\nafter\n", 13) == 0,
          "what was appended");
}

static void check_directory(void)
{
    DIR *stream = fdopendir(directory);
    int entries = 0;

    CHECK(stream != NULL, "fdopendir");
    while (readdir(stream) != NULL)
        entries++;
    CHECK(entries == 12, "%d entries", entries);
}

int main(void)
{
    pid_t child;
    int status;
    char byte;

    prepare();
    child = start_child();
    for (int i = 0; i < count; i++)
        pictures[fds[i]] = look(fds[i]);
    ready();
    wait_for_go();
    check_all();
    MUST(lseek(duplicate, 1000, SEEK_SET));
    CHECK(lseek(first, 0, SEEK_CUR) == 1000, "fds made by dup no longer share their position");
    MUST(write(to_child[1], "c", 1));
    CHECK(read(from_child[0], &byte, 1) == 1, "the child did not answer");
    CHECK(lseek(second, 0, SEEK_CUR) == 2000, "the child's fd no longer shares its position");
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %#x", status);
    check_directory();
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A file that was deleted by the name that it was opened by, and has another one: it is the same file by both, open or
 * by its name, and what is written to one is read from the other. The other name is in a directory of its own, where nobody
 * looks for it.
 */
#include "victim.h"

#include <sys/stat.h>

#define SIZE 20000

static int writer, reader, of_directory;

static ino_t inode_of(int fd)
{
    struct stat found;

    MUST(fstat(fd, &found));
    return found.st_ino;
}

static void check_same(void)
{
    struct stat found;

    MUST(stat("elsewhere/other", &found));
    CHECK(inode_of(writer) == found.st_ino, "the writer has inode %lu, not %lu", inode_of(writer), found.st_ino);
    CHECK(inode_of(reader) == found.st_ino, "the reader has inode %lu, not %lu", inode_of(reader), found.st_ino);
    MUST(stat("elsewhere/another", &found));
    CHECK(inode_of(of_directory) == found.st_ino, "the one in the directory has inode %lu", inode_of(of_directory));
}

int main(void)
{
    char text[SIZE], byte;

    fill(text, SIZE, 1);
    MUST(mkdir("elsewhere", 0700));
    writer = MUST(open("first", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    CHECK(write(writer, text, SIZE) == SIZE, "write");
    reader = MUST(open("first", O_RDONLY));
    MUST(lseek(reader, 77, SEEK_SET));
    MUST(link("first", "elsewhere/other"));
    MUST(unlink("first"));
    MUST(mkdir("directory", 0700));
    of_directory = MUST(open("directory/first", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0400));
    MUST(link("directory/first", "elsewhere/another"));
    MUST(unlink("directory/first"));
    ready();
    wait_for_go();

    check_same();
    CHECK(access("first", F_OK) == -1 && errno == ENOENT, "it has its old name back");
    CHECK(lseek(reader, 0, SEEK_CUR) == 77, "position %ld", lseek(reader, 0, SEEK_CUR));
    CHECK(pread(reader, text, SIZE, 0) == SIZE, "read");
    check_filled(text, SIZE, 1, "content");
    CHECK(pwrite(writer, "!", 1, 5) == 1, "write");
    CHECK(pread(MUST(open("elsewhere/other", O_RDONLY)), &byte, 1, 5) == 1 && byte == '!', "'%c' by the other name", byte);
    CHECK(write(of_directory, "x", 1) == 1, "append");
    return 0;
}

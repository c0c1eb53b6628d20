/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Directories that were removed: one is the working directory and open, the other one is open and read halfway.
 */
#include "victim.h"

#include <limits.h>
#include <sys/stat.h>

static int current, open_one;

static void check(void)
{
    struct stat here, opened;
    char path[PATH_MAX], entries[256];

    CHECK(syscall(SYS_getcwd, path, sizeof path) == -1 && errno == ENOENT, "getcwd");
    MUST(stat(".", &here));
    MUST(fstat(current, &opened));
    CHECK(here.st_ino == opened.st_ino && here.st_dev == opened.st_dev, "the working directory is another one");
    CHECK(here.st_nlink == 0 && (here.st_mode & 07777) == 0710, "%lu links, mode %#o", here.st_nlink, here.st_mode);
    CHECK(open("new", O_WRONLY | O_CREAT, 0600) == -1 && errno == ENOENT, "it takes entries");
    CHECK(syscall(SYS_getdents64, current, entries, sizeof entries) == -1 && errno == ENOENT, "it has entries");
    MUST(fstat(open_one, &opened));
    CHECK(opened.st_ino != here.st_ino && opened.st_nlink == 0 && (opened.st_mode & 07777) == 0700, "the open one: %#o",
          opened.st_mode);
    CHECK(openat(open_one, "new", O_WRONLY | O_CREAT, 0600) == -1 && errno == ENOENT, "the open one takes entries");
}

int main(void)
{
    MUST(mkdir("here", 0710));
    MUST(mkdir("open", 0700));
    open_one = MUST(open("open", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    current = MUST(open("here", O_RDONLY | O_DIRECTORY));
    MUST(rmdir("open"));
    MUST(chdir("here"));
    MUST(rmdir("../here"));
    check();
    ready();
    wait_for_go();
    check();
    return 0;
}

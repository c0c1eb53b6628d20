/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Files that are open with O_PATH, and not followed symbolic links, with their names and deleted; deleted nodes of
 * devices, which root alone can make.
 */
#include "victim.h"

#include <sys/stat.h>
#include <sys/sysmacros.h>

#define MOST 16

static struct {
    const char *what;
    int fd, flags;
    struct stat before;
    bool deleted;
} files[MOST];
static int count, shared, null_device = -1;

static int keep(const char *what, int fd, bool deleted)
{
    files[count].what = what;
    files[count].fd = fd;
    files[count].flags = MUST(fcntl(fd, F_GETFL));
    files[count].deleted = deleted;
    MUST(fstat(fd, &files[count].before));
    count++;
    return fd;
}

static void make(const char *path)
{
    int fd = MUST(open(path, O_WRONLY | O_CREAT | O_EXCL, 0640));

    MUST(dprintf(fd, "content of %s", path));
    close(fd);
}

static int symlink_fd, gone_symlink, gone_file, gone_directory, gone_device = -1;

static void prepare(void)
{
    make("file");
    keep("a file", MUST(open("file", O_PATH)), false);
    keep("a file, not followed", MUST(open("file", O_PATH | O_NOFOLLOW | O_CLOEXEC)), false);
    MUST(mkdir("directory", 0750));
    keep("a directory", MUST(open("directory", O_PATH | O_DIRECTORY)), false);
    MUST(symlink("where/it leads", "link"));
    symlink_fd = keep("a link", MUST(open("link", O_PATH | O_NOFOLLOW)), false);
    MUST(mkfifo("pipe", 0600));
    keep("a FIFO", MUST(open("pipe", O_PATH)), false);
    keep("a device", MUST(open("/dev/null", O_PATH)), false);
    MUST(symlink("where/it led", "gone link"));
    gone_symlink = keep("a deleted link", MUST(open("gone link", O_PATH | O_NOFOLLOW)), true);
    MUST(unlink("gone link"));
    make("gone file");
    gone_file = keep("a deleted file", MUST(open("gone file", O_PATH)), true);
    shared = MUST(open("gone file", O_RDWR));
    MUST(unlink("gone file"));
    MUST(mkdir("gone directory", 0711));
    gone_directory = keep("a removed directory", MUST(open("gone directory", O_PATH | O_DIRECTORY)), true);
    MUST(rmdir("gone directory"));
    make("linked");
    keep("a file with another name", MUST(open("linked", O_PATH)), false);
    MUST(link("linked", "other"));
    MUST(unlink("linked"));
    if (mknod("null", S_IFCHR | 0640, makedev(1, 3)) == -1) {
        CHECK(errno == EPERM, "mknod");
        return;
    }
    gone_device = keep("a deleted device", MUST(open("null", O_PATH)), true);
    null_device = keep("a deleted device, open", MUST(open("null", O_RDWR | O_APPEND)), true);
    MUST(unlink("null"));
}

static void check(void)
{
    struct stat found, other;
    char text[64];
    ssize_t length;

    for (int i = 0; i < count; i++) {
        struct stat *before = &files[i].before;

        MUST(fstat(files[i].fd, &found));
        CHECK(fcntl(files[i].fd, F_GETFL) == files[i].flags, "%s: flags %#o, not %#o", files[i].what,
              fcntl(files[i].fd, F_GETFL), files[i].flags);
        CHECK(found.st_mode == before->st_mode, "%s: mode %#o, not %#o", files[i].what, found.st_mode, before->st_mode);
        CHECK(found.st_rdev == before->st_rdev, "%s: device %#lx", files[i].what, found.st_rdev);
        CHECK(files[i].deleted || found.st_ino == before->st_ino, "%s: another inode", files[i].what);
        CHECK(!files[i].deleted || found.st_nlink == 0, "%s: it has a name", files[i].what);
    }
    length = readlinkat(symlink_fd, "", text, sizeof text);
    CHECK(length == 14 && memcmp(text, "where/it leads", 14) == 0, "the link leads elsewhere");
    length = readlinkat(gone_symlink, "", text, sizeof text);
    CHECK(length == 12 && memcmp(text, "where/it led", 12) == 0, "the deleted link leads elsewhere");
    CHECK(read(symlink_fd, text, 1) == -1 && errno == EBADF, "O_PATH can be read");
    MUST(fstat(shared, &other));
    MUST(fstat(gone_file, &found));
    CHECK(found.st_ino == other.st_ino, "the deleted file is two files");
    CHECK(pread(shared, text, sizeof text, 0) == 20 && memcmp(text, "content of gone file", 20) == 0, "content");
    CHECK(openat(gone_directory, "new", O_WRONLY | O_CREAT, 0600) == -1 && errno == ENOENT, "a removed directory");
    if (null_device != -1)
        CHECK(write(null_device, "x", 1) == 1 && read(null_device, text, 1) == 0, "the deleted device");
}

int main(void)
{
    prepare();
    check();
    ready();
    wait_for_go();
    check();
    return 0;
}

/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Mapped files that were deleted and have another name, one of them open as well: what is written to the memory is read
 * from the file by its other name, which is in another directory, and by the fd.
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/stat.h>

#define SIZE 20000

static int fd;
static char *open_too, *closed;

static char *map(const char *name, const char *other, int *kept)
{
    char text[SIZE], *at;
    int file = MUST(open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));

    fill(text, SIZE, 1);
    CHECK(write(file, text, SIZE) == SIZE, "write");
    at = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    MUST(link(name, other));
    MUST(unlink(name));
    if (kept != NULL)
        *kept = file;
    else
        close(file);
    return at;
}

static void check(char *at, const char *other, int kept)
{
    char byte;

    check_filled(at, SIZE, 1, other);
    at[9] = '?';
    CHECK(pread(MUST(open(other, O_RDONLY)), &byte, 1, 9) == 1 && byte == '?', "'%c' by the name '%s'", byte, other);
    CHECK(kept == -1 || (pread(kept, &byte, 1, 9) == 1 && byte == '?'), "'%c' by the fd", byte);
}

int main(void)
{
    MUST(mkdir("elsewhere", 0700));
    open_too = map("open", "elsewhere/open", &fd);
    closed = map("closed", "elsewhere/closed", NULL);
    ready();
    wait_for_go();
    check(open_too, "elsewhere/open", fd);
    check(closed, "elsewhere/closed", -1);
    return 0;
}

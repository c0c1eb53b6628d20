/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Memfds that are programs: they can be executed while their writer has them open, as no description that
 * memfd_create(2) gave counts as a writer; and permissions to execute that are sealed (MFD_EXEC, MFD_NOEXEC_SEAL).
 */
#include "victim.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x08            /* since 6.3 */
#define MFD_EXEC 0x10
#endif
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x20
#endif
#define ALL_SEALS (F_SEAL_EXEC | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)

static int program, mapped, twice, again, read_only, data, frozen;
static const char *text;
static bool has_seals;
static off_t size;

static int copy_of_true(const char *name, unsigned int flags)
{
    int to, from = MUST(open("/bin/true", O_RDONLY | O_CLOEXEC));
    char bytes[1 << 16];
    ssize_t got;

    /* EINVAL where the kernel knows no such flags: then every memfd may be executed */
    to = memfd_create(name, MFD_CLOEXEC | flags);
    if (to == -1)
        to = MUST(memfd_create(name, MFD_CLOEXEC | (flags & ~(unsigned int)MFD_EXEC)));
    while ((got = read(from, bytes, sizeof bytes)) > 0)
        CHECK(write(to, bytes, (size_t)got) == got, "write");
    close(from);
    size = MUST(lseek(to, 0, SEEK_CUR));
    return to;
}

static void prepare(void)
{
    char path[32];
    int number;

    program = copy_of_true("program", MFD_EXEC);
    MUST(fcntl(program, F_SETFL, O_APPEND));
    mapped = copy_of_true("mapped program", MFD_EXEC | MFD_ALLOW_SEALING);
    text = MUST(mmap(NULL, 4096, PROT_READ, MAP_SHARED, mapped, 0));
    snprintf(path, sizeof path, "/proc/self/fd/%d", mapped);
    read_only = MUST(open(path, O_RDONLY | O_CLOEXEC));
    twice = copy_of_true("opened twice", MFD_EXEC);
    snprintf(path, sizeof path, "/proc/self/fd/%d", twice);
    /* nothing shows which of two is the one of memfd_create(2): a restart takes that of the lowest number for it */
    number = MUST(open(path, O_RDWR | O_CLOEXEC));
    again = MUST(fcntl(number, F_DUPFD_CLOEXEC, 40));
    MUST(close(number));
    data = memfd_create("data", MFD_CLOEXEC | MFD_NOEXEC_SEAL);
    has_seals = data != -1;
    if (!has_seals)
        return;
    MUST(write(data, "data", 4));
    frozen = copy_of_true("frozen", MFD_EXEC | MFD_ALLOW_SEALING);
    MUST(fcntl(frozen, F_ADD_SEALS, F_SEAL_EXEC));
}

/* The wait status of the program, or the errno with which it cannot be executed, as an exit status. */
static int executed(int fd)
{
    static char *const nothing[] = {"program", NULL};
    pid_t child = MUST(fork());
    int status;

    if (child == 0) {
        syscall(SYS_execveat, fd, "", nothing, nothing + 1, AT_EMPTY_PATH);
        _exit(errno);
    }
    CHECK(waitpid(child, &status, 0) == child, "waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : status;
}

static mode_t mode_of(int fd)
{
    struct stat found;

    MUST(fstat(fd, &found));
    return found.st_mode & 07777;
}

static void check(void)
{
    int status, seals;

    CHECK((status = executed(program)) == 0, "the program is executed with %d", status);
    CHECK((status = executed(mapped)) == 0, "the mapped program is executed with %d", status);
    CHECK((status = executed(read_only)) == 0, "by an fd for reading it is executed with %d", status);
    CHECK((status = executed(twice)) == ETXTBSY, "one that is open for writing is executed with %d", status);
    CHECK(fcntl(program, F_GETFL) & O_APPEND, "flags %#x", fcntl(program, F_GETFL));
    CHECK(lseek(program, 0, SEEK_CUR) == size, "position %ld", (long)lseek(program, 0, SEEK_CUR));
    CHECK(memcmp(text, "\177ELF", 4) == 0, "the mapping is of another file");
    CHECK(fcntl(program, F_GET_SEALS) == F_SEAL_SEAL, "seals %#x", fcntl(program, F_GET_SEALS));
    if (!has_seals)
        return;
    CHECK((seals = fcntl(data, F_GET_SEALS)) == F_SEAL_EXEC, "seals of data %#x", seals);
    CHECK(mode_of(data) == 0666, "mode of data %#o", mode_of(data));
    CHECK(fchmod(data, 0777) == -1 && errno == EPERM, "data can be made executable");
    CHECK((seals = fcntl(frozen, F_GET_SEALS)) == ALL_SEALS, "seals of the frozen one %#x", seals);
    CHECK(mode_of(frozen) == 0777 && executed(frozen) == 0, "mode of the frozen one %#o", mode_of(frozen));
}

int main(void)
{
    int status;

    prepare();
    check();
    ready();
    wait_for_go();
    check();
    MUST(close(again));
    CHECK((status = executed(twice)) == 0, "without its writer it is executed with %d", status);
    return 0;
}

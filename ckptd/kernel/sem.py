# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V semaphore sets of our IPC namespace (semctl(2), proc_sysvipc_sem(5))."""

from typing import NamedTuple

from ckptd.kernel.decl import c_int, c_void_p, libc
from ckptd.kernel.procfs import read_file

GETPID = 11         # <linux/sem.h>


@libc
def _semctl(semid: c_int, semnum: c_int, cmd: c_int, arg: c_void_p) -> c_int: ...


class SemaphoreSet(NamedTuple):
    """A set."""
    semid: int
    key: int        # unsigned, 0 for IPC_PRIVATE
    mode: int       # permission bits
    nsems: int
    uid: int
    gid: int
    used: int       # time of the last semop(2) in seconds, 0 for never


def parse_sets(data: bytes) -> list[SemaphoreSet]:
    """Parse rows of key, semid, mode (octal), nsems, uid, gid, cuid, cgid, otime and ctime."""
    rows = (row.split() for row in data.splitlines()[1:])
    return [SemaphoreSet(int(semid), int(key) & 0xFFFFFFFF, int(mode, 8), int(count), int(uid), int(gid), int(used))
            for key, semid, mode, count, uid, gid, _, _, used, *_ in rows]


def list_sets() -> list[SemaphoreSet]:
    return parse_sets(read_file('/proc/sysvipc/sem'))


def last_users(one: SemaphoreSet) -> list[int]:
    """Return the pid of the last semop(2) of each semaphore (GETPID). OSError: EACCES without the right to read it."""
    return [_semctl(one.semid, number, GETPID, None) for number in range(one.nsems)]

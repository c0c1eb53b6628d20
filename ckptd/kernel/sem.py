# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V semaphore sets of our IPC namespace (semctl(2), proc_sysvipc_sem(5))."""

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from ckptd.kernel.decl import c_int, c_ulong, c_void_p, cstruct, libc, s64
from ckptd.kernel.ipc import IPC_CREAT, IPC_EXCL, IPC_RMID, IPC_SET, IPC_STAT, choose_next_id, ipc_perm
from ckptd.kernel.procfs import read_file

GETPID, GETALL, SETALL = 11, 13, 17         # <linux/sem.h>
SEMVMX = 32767


@cstruct(size=104)
class semid_ds(ctypes.Structure):
    """struct semid64_ds of <asm/sembuf.h>"""
    sem_perm: ipc_perm
    sem_otime: s64
    unused1: c_ulong
    sem_ctime: s64
    unused2: c_ulong
    sem_nsems: c_ulong
    unused3: c_ulong
    unused4: c_ulong


@libc
def _semctl(semid: c_int, semnum: c_int, cmd: c_int, arg: c_void_p) -> c_int: ...


@libc
def _semget(key: c_int, nsems: c_int, semflg: c_int) -> c_int: ...


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


class Semaphores(NamedTuple):
    """A set with its values."""
    key: int        # unsigned, 0 for IPC_PRIVATE
    mode: int       # permission bits
    uid: int
    gid: int
    values: tuple[int, ...]


def read_set(semid: int) -> tuple[Semaphores, int]:
    """Return a set, and the uid that has made it. OSError: EINVAL, EIDRM: none such; EACCES: no read permission."""
    data = semid_ds()
    _semctl(semid, 0, IPC_STAT, ctypes.byref(data))
    values = (ctypes.c_uint16 * data.sem_nsems)()
    _semctl(semid, 0, GETALL, ctypes.byref(values))
    perm = data.sem_perm
    return Semaphores(perm.key & 0xFFFFFFFF, perm.mode & 0o777, perm.uid, perm.gid, tuple(values)), perm.cuid


def semget_at(semid: int, key: int, nsems: int) -> None:
    """Make a set with exactly this id. EEXIST: another one has the id or the key."""
    choose_next_id('sem', semid)
    got = _semget(ctypes.c_int(key).value, nsems, 0o600 | IPC_CREAT | IPC_EXCL)
    if got != semid:
        semctl_remove(got)
        raise OSError(errno.EEXIST, f'semget: {os.strerror(errno.EEXIST)}: id {got} instead of {semid}')


def semctl_set(semid: int, values: Sequence[int], uid: int, gid: int, mode: int) -> None:
    """Set all values (SETALL), then owner and permission bits (IPC_SET)."""
    numbers = (ctypes.c_uint16 * len(values))(*values)
    _semctl(semid, 0, SETALL, ctypes.byref(numbers))
    data = semid_ds()
    data.sem_perm.uid, data.sem_perm.gid, data.sem_perm.mode = uid, gid, mode
    _semctl(semid, 0, IPC_SET, ctypes.byref(data))


def semctl_remove(semid: int) -> None:
    """IPC_RMID: remove the set at once."""
    _semctl(semid, 0, IPC_RMID, None)

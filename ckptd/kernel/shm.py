# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V shared memory segments (shmctl(2)). /proc/PID/maps shows the shmid of a mapped segment as its inode."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptd.kernel.decl import (
    c_int,
    c_size_t,
    c_ssize_t,
    c_ulong,
    c_void_p,
    cstruct,
    libc,
    s32,
    s64,
    u64,
)
from ckptd.kernel.ipc import IPC_CREAT, IPC_EXCL, IPC_RMID, IPC_SET, IPC_STAT, choose_next_id, ipc_perm
from ckptd.kernel.mman import huge_page_flags

SHM_RDONLY, SHM_EXEC = 0o10000, 0o100000    # of shmat(2)
SHM_DEST = 0o1000       # <linux/shm.h>, of mode: destroyed at the last detach
SHM_LOCKED = 0o2000
SHM_HUGETLB = 0o4000    # of shmget(2)


@cstruct(size=112)
class shmid_ds(ctypes.Structure):
    """struct shmid64_ds of <asm-generic/shmbuf.h>"""
    shm_perm: ipc_perm
    shm_segsz: u64
    shm_atime: s64
    shm_dtime: s64
    shm_ctime: s64
    shm_cpid: s32
    shm_lpid: s32
    shm_nattch: u64
    unused4: c_ulong
    unused5: c_ulong


@libc
def _shmctl(shmid: c_int, cmd: c_int, buf: c_void_p) -> c_int: ...


@libc
def _shmget(key: c_int, size: c_size_t, shmflg: c_int) -> c_int: ...


@libc
def _shmat(shmid: c_int, shmaddr: c_void_p, shmflg: c_int) -> c_ssize_t: ...


@libc
def _shmdt(shmaddr: c_void_p) -> c_int: ...


class ShmidDs(NamedTuple):
    """A segment."""
    shmid: int
    key: int     # unsigned, 0 for IPC_PRIVATE
    mode: int    # permission bits, | SHM_DEST, SHM_LOCKED
    uid: int
    gid: int
    cuid: int
    cgid: int
    size: int    # bytes
    attached: int
    creator: int
    last: int


def shmctl_stat(shmid: int) -> ShmidDs:
    """IPC_STAT of a segment of the caller's IPC namespace. EINVAL: none such; EACCES: no read permission."""
    data = shmid_ds()
    _shmctl(shmid, IPC_STAT, ctypes.byref(data))
    perm = data.shm_perm
    return ShmidDs(shmid, perm.key & 0xFFFFFFFF, perm.mode, perm.uid, perm.gid, perm.cuid, perm.cgid, data.shm_segsz,
                   data.shm_nattch, data.shm_cpid, data.shm_lpid)


def shmget_at(shmid: int, key: int, size: int, mode: int, huge: int = 0) -> None:
    """Make a segment with exactly this id. EEXIST: another one has the id or the key; EPERM without
    CAP_CHECKPOINT_RESTORE (sysctl kernel.shm_next_id, proc_sys_kernel(5)). huge: size of its pages in bytes, if they
    are huge pages; EPERM without CAP_IPC_LOCK (vm.hugetlb_shm_group)."""
    choose_next_id('shm', shmid)
    flags = SHM_HUGETLB | huge_page_flags(huge) if huge else 0
    got = _shmget(ctypes.c_int(key).value, size, ctypes.c_int(mode | flags | IPC_CREAT | IPC_EXCL).value)
    if got != shmid:
        shmctl_remove(got)
        raise OSError(errno.EEXIST, f'shmget: {os.strerror(errno.EEXIST)}: id {got} instead of {shmid}')


def shmctl_set(shmid: int, uid: int, gid: int, mode: int) -> None:
    """IPC_SET: set owner and permission bits."""
    data = shmid_ds()
    _shmctl(shmid, IPC_STAT, ctypes.byref(data))
    data.shm_perm.uid, data.shm_perm.gid, data.shm_perm.mode = uid, gid, mode
    _shmctl(shmid, IPC_SET, ctypes.byref(data))


def shmctl_remove(shmid: int) -> None:
    """IPC_RMID: remove the segment with its last user."""
    _shmctl(shmid, IPC_RMID, None)


@contextmanager
def attached(shmid: int, size: int) -> Iterator[memoryview]:
    """Map the segment's memory for the duration of the block."""
    address = _shmat(shmid, None, 0)
    try:
        yield memoryview((ctypes.c_ubyte * size).from_address(address)).cast('B')
    finally:
        _shmdt(address)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V shared memory, beside /proc/sysvipc/shm."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.kernel.maps import read_maps
from ckptd.kernel.shm import SHM_DEST, shmctl_stat

IPC_CREAT, IPC_RMID = 0o1000, 0         # <linux/ipc.h>
KEY = 0xF0000000 | os.getpid()          # above 2**31: negative as a key_t


@pytest.fixture
def libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    return libc


@pytest.fixture
def segment(libc: ctypes.CDLL) -> Iterator[int]:
    shmid = libc.shmget(ctypes.c_int(KEY), ctypes.c_size_t(10_000), IPC_CREAT | 0o640)
    assert shmid >= 0
    yield shmid
    libc.shmctl(shmid, IPC_RMID, None)


def test_a_segment_as_proc_has_it(segment: int) -> None:
    found = shmctl_stat(segment)
    rows = [line.split() for line in Path('/proc/sysvipc/shm').read_text().splitlines()]
    row = dict(zip(rows[0], next(row for row in rows if row[1] == str(segment)), strict=True))
    assert (found.key, found.size, found.mode) == (KEY, 10_000, 0o640)
    assert [found.uid, found.gid, found.cuid, found.cgid, found.creator, found.attached] == [
        int(row[name]) for name in ('uid', 'gid', 'cuid', 'cgid', 'cpid', 'nattch')]
    assert int(row['key']) % 2**32 == found.key


def test_a_mapping_leads_to_it_also_when_it_is_removed(segment: int, libc: ctypes.CDLL) -> None:
    address = libc.shmat(segment, None, 0)
    try:
        mapping, = (one for one in read_maps(os.getpid()) if one.start == address)
        assert (mapping.inode, mapping.file_path, mapping.shared) == (segment, f'/SYSV{KEY:08x}', True)
        libc.shmctl(segment, IPC_RMID, None)
        found = shmctl_stat(mapping.inode)
        assert found.mode & SHM_DEST
        assert (found.attached, found.last) == (1, os.getpid())
    finally:
        libc.shmdt(ctypes.c_void_p(address))


def test_no_such_segment() -> None:
    with pytest.raises(OSError, match='shmctl: Invalid argument'):
        shmctl_stat(0x7FFFFFFF)

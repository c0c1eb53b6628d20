# SPDX-License-Identifier: LGPL-2.1-or-later
"""Huge pages of hugetlb: sizes, pools, and data of files (Documentation/admin-guide/mm/hugetlbpage.rst)."""

import errno
import functools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ckptd.kernel.memfd import F_SEAL_EXEC, make_memfd

_POOLS = Path('/sys/kernel/mm/hugepages')
_POOL = re.compile(r'hugepages-(\d+)kB')
_GROUP = Path('/proc/sys/vm/hugetlb_shm_group')
_SECTOR = 512       # unit of st_blocks, inode(7)
_STEP = 64 << 10    # bytes; the smallest huge page of any architecture is as large
_ZERO = bytes(_STEP)


@functools.cache
def page_sizes() -> frozenset[int]:
    """Return the sizes in bytes of the huge pages that this kernel has."""
    with suppress(FileNotFoundError):       # without CONFIG_HUGETLBFS
        return frozenset(int(found[1]) << 10 for one in _POOLS.iterdir() if (found := _POOL.fullmatch(one.name)))
    return frozenset()


@functools.cache
def hugetlb_devices() -> frozenset[int]:
    """Return st_dev of the kernel's own hugetlbfs mounts, one for each size. No mountinfo lists them, but every memfd
    of huge pages is on one (hugetlbfs_vfsmount of fs/hugetlbfs/inode.c)."""
    found = set()
    for size in page_sizes():
        try:
            fd = make_memfd('ckptd', 0, F_SEAL_EXEC, size)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV, errno.ENOENT):       # it has no mount of this size
                continue
            raise
        found.add(os.fstat(fd).st_dev)
        os.close(fd)
    return frozenset(found)


def pool(size: int) -> Path:
    """Return the directory in which a pool of huge pages is set up."""
    return _POOLS / f'hugepages-{size >> 10}kB'


def free_pages(size: int) -> int:
    """Return the pages of a pool that are neither used nor reserved; 0 if there is no such pool."""
    try:
        return _number(pool(size) / 'free_hugepages') - _number(pool(size) / 'resv_hugepages')
    except FileNotFoundError:
        return 0


def shm_group() -> int:
    """Return the group that may make System V segments of huge pages without CAP_IPC_LOCK."""
    return _number(_GROUP)


def written_pages(fd: int, size: int, page: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the huge pages of a file that are not zero. SEEK_DATA takes all of a hugetlbfs file for
    data, so unless all pages are there, each is read."""
    there = os.fstat(fd).st_blocks * _SECTOR
    if not there:
        return
    if there >= size:
        yield 0, size
        return
    for start in range(0, size, page):
        if any(os.pread(fd, _STEP, at) != _ZERO for at in range(start, start + page, _STEP)):
            yield start, start + page


def _number(path: Path) -> int:
    return int(path.read_text())

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own mounts, which hold memfds, shared anonymous memory and System V segments without a name: a tmpfs,
and a hugetlbfs for each size of huge pages."""

import functools
import os

from ckptd.kernel.hugetlb import hugetlb_devices
from ckptd.kernel.maps import Mapping
from ckptd.kernel.memfd import F_SEAL_EXEC, make_memfd

# names that /proc shows for objects of these mounts (mm/memfd.c, ipc/shm.c, mm/shmem.c, fs/hugetlbfs/inode.c)
MEMFD_PREFIX, SYSV_PREFIX = '/memfd:', '/SYSV'
NAMED_ANONYMOUS = '[anon_shmem:'        # with a name by PR_SET_VMA_ANON_NAME
ANONYMOUS_HUGE = '/anon_hugepage (deleted)'     # of private memory, too
SHARED_ANONYMOUS = ('/dev/zero (deleted)', NAMED_ANONYMOUS, ANONYMOUS_HUGE)
_PREFIXES = (MEMFD_PREFIX, SYSV_PREFIX, *SHARED_ANONYMOUS)


@functools.cache
def shm_devices() -> frozenset[int]:
    """Return st_dev of these mounts. No mountinfo lists the tmpfs, but every memfd is on it (shm_mnt of mm/shmem.c)."""
    fd = make_memfd('ckptd', 0, F_SEAL_EXEC)
    try:
        return hugetlb_devices() | {os.fstat(fd).st_dev}
    finally:
        os.close(fd)


def on_shm_mount(stat: os.stat_result) -> bool:
    return stat.st_dev in shm_devices()


def is_of_shm_mount(mapping: Mapping) -> bool:
    return os.makedev(mapping.major, mapping.minor) in shm_devices()


def is_object_of_shm_mount(mapping: Mapping) -> bool:
    """Whether a mapping is of a memfd, a System V segment or shared anonymous memory. A file may have such a name,
    too."""
    return mapping.path.startswith(_PREFIXES) and is_of_shm_mount(mapping)

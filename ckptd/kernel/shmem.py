# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own tmpfs mount, which holds memfds, shared anonymous memory and System V segments without a name."""

import functools
import os

from ckptd.kernel.maps import Mapping
from ckptd.kernel.memfd import F_SEAL_EXEC, make_memfd

# names that /proc shows for objects of that mount (mm/memfd.c, ipc/shm.c, mm/shmem.c)
MEMFD_PREFIX, SYSV_PREFIX = '/memfd:', '/SYSV'
NAMED_ANONYMOUS = '[anon_shmem:'        # with a name by PR_SET_VMA_ANON_NAME
SHARED_ANONYMOUS = ('/dev/zero (deleted)', NAMED_ANONYMOUS)
_PREFIXES = (MEMFD_PREFIX, SYSV_PREFIX, *SHARED_ANONYMOUS)


@functools.cache
def shm_device() -> int:
    """Return st_dev of that mount. No mountinfo lists it, but every memfd is on it (shm_mnt of mm/shmem.c)."""
    fd = make_memfd('ckptd', 0, F_SEAL_EXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def on_shm_mount(stat: os.stat_result) -> bool:
    return stat.st_dev == shm_device()


def is_of_shm_mount(mapping: Mapping) -> bool:
    return os.makedev(mapping.major, mapping.minor) == shm_device()


def is_object_of_shm_mount(mapping: Mapping) -> bool:
    """Whether a mapping is of a memfd, a System V segment or shared anonymous memory. A file may have such a name,
    too."""
    return mapping.path.startswith(_PREFIXES) and is_of_shm_mount(mapping)

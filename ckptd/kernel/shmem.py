# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's own tmpfs mount, which holds memfds, shared anonymous memory and System V segments without a name."""

import functools
import os

from ckptd.kernel.memfd import F_SEAL_EXEC, make_memfd


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

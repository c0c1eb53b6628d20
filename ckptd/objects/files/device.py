# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open a character device by its name, and check that it is the right one."""

import os
import stat

from ckptd.errors import CkptError
from ckptd.objects.files.base import RestoreContext


def is_device(found: os.stat_result, device: int) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == device


def open_device(path: str, device: int, flags: int, ctx: RestoreContext) -> int:
    """Open exactly this device. O_NOCTTY, so that it does not become a controlling terminal."""
    fd = ctx.open(path, flags | os.O_NOCTTY)
    if not is_device(os.fstat(fd), device):
        os.close(fd)
        raise CkptError(f'{path} is no longer the device {os.major(device)}:{os.minor(device)}', resource=path)
    return fd

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to file servers, as fusectl shows them: a directory for each FUSE file system, named by its device.

    /sys/fs/fuse/connections/DEVICE/abort       a byte written to it ends the connection

Documentation/filesystems/fuse/fuse.rst of the kernel.
"""

import os
from pathlib import Path

from ckptd.kernel.mountinfo import read_mountinfo


def connections() -> Path | None:
    """Where fusectl is mounted, whole."""
    points = [mount.mount_point for mount in read_mountinfo() if mount.fs_type == 'fusectl' and mount.root == '/']
    return Path(points[0]) if points else None


def abort(directory: Path, device: int) -> bool:
    """End the connection of this device (as of `statx.device_of`): who waits for its server hears ECONNABORTED, who
    asks for anything later ENOTCONN. directory: of `connections`. False where it has none, or we may not."""
    try:
        # without O_CREAT: a device that is none's must not become a file of something that is mounted over it
        fd = os.open(directory / str(device) / 'abort', os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b'1')
    except OSError:
        return False
    finally:
        os.close(fd)
    return True

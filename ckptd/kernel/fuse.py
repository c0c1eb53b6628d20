# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections to file servers, as fusectl shows them: a directory for each FUSE file system, named by its device.

    /sys/fs/fuse/connections/DEVICE/abort       a byte written to it aborts the connection

Documentation/filesystems/fuse/fuse.rst of the kernel.
"""

import os
from pathlib import Path

from ckptd.kernel.mountinfo import read_mountinfo


def connections() -> Path | None:
    """Return where fusectl is mounted as a whole."""
    points = [mount.mount_point for mount in read_mountinfo() if mount.fs_type == 'fusectl' and mount.root == '/']
    return Path(points[0]) if points else None


def abort(directory: Path, device: int) -> bool:
    """Abort the connection of this device (as returned by `statx.device_of`). Calls that wait for its server fail with
    ECONNABORTED, later ones with ENOTCONN. directory: from `connections`. Return False if there is no such connection,
    or this process may not abort it."""
    try:
        # without O_CREAT, so that an unknown device does not create a file in a file system mounted over fusectl
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

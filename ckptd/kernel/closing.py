# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closing file descriptors that came from somebody else."""

import contextlib
import os
import socket
import struct


def close_foreign(fd: int) -> None:
    """Close without an error, which is that of a file system that is not ours (close(2), EIO), and without waiting for
    what a socket has still to send, as its sender may have asked for (SO_LINGER, socket(7))."""
    with contextlib.suppress(OSError):
        if os.readlink(f'/proc/self/fd/{fd}').startswith('socket:'):  # noqa: PTH115 - fstat(2) may ask a file server
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 0, 0))
    with contextlib.suppress(OSError):
        os.close(fd)

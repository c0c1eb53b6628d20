# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closing file descriptors that came from somebody else.

close(2) asks the file system (FUSE_FLUSH), and that may be a program of whoever sent the fd, which never answers, not
even to SIGKILL. So each such close has a thread for itself.
"""

import contextlib
import os
import socket
import struct
import threading
from typing import Final

MOST: Final = 256       # that wait for somebody's file system; while there are so many no fds are taken in
# what /proc/self/fd says of files that no file system has a say in
_OURS: Final = ('pipe:', 'anon_inode:[pidfd]', 'pidfd:')


class _Closer:
    """Closes each fd in a thread that ends with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.waiting = 0

    def __call__(self, fd: int) -> None:
        with self._lock:
            self.waiting += 1
        # a daemon thread: the interpreter does not wait for it at its end
        threading.Thread(target=self._work, args=(fd,), name='close', daemon=True).start()

    def _work(self, fd: int) -> None:
        _close(fd)
        with self._lock:
            self.waiting -= 1


def _close(fd: int) -> None:
    # an error would be that of a file system that is not ours (close(2), EIO)
    with contextlib.suppress(OSError):
        os.close(fd)


_closer = _Closer()


def close_foreign(fd: int) -> None:
    """Close without an error and without waiting, neither for a file system nor for what a socket has still to send, as
    its sender may have asked for (SO_LINGER, socket(7))."""
    try:
        link = os.readlink(f'/proc/self/fd/{fd}')  # noqa: PTH115 - fstat(2) may ask a file server
    except OSError:
        link = ''
    if link.startswith('socket:'):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 0, 0))
        _close(fd)
    elif link.startswith(_OURS):
        _close(fd)
    else:
        _closer(fd)


def closing() -> int:
    """How many fds wait to be closed."""
    return _closer.waiting

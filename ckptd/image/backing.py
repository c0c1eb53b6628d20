# SPDX-License-Identifier: LGPL-2.1-or-later
"""BackingFile: bytes of a mapped file that the image does not have, from the file itself while it is still the same."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from ckptd.image.records import Backing


class BackingFile:
    """A file named by a Backing record.

    Its owner may put a link to somebody else's file at the path, of the same size and mtime: only the very inode that
    was mapped is read. It is opened for each piece and never held, so a thousand mapped libraries cost no fds.
    """

    def __init__(self, record: Backing) -> None:
        self.record = record

    @contextmanager
    def _open(self) -> Iterator[int]:
        """An fd; -1 where the path leads to nothing or to another file."""
        path = os.fsencode(self.record.path)
        fd = -1
        try:
            # the path of a mapping is resolved already. O_NONBLOCK: it may have become a FIFO or a device
            if path.startswith(b'/') and stat.S_ISREG(os.lstat(path).st_mode):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError):       # ValueError: a zero byte in a path from a hostile image
            fd = -1
        try:
            yield fd if fd >= 0 and self._is_same(os.fstat(fd)) else -1
        finally:
            if fd >= 0:
                os.close(fd)

    def _is_same(self, found: os.stat_result) -> bool:
        record = self.record
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) == (
            record.device, record.inode, record.size, record.mtime) and stat.S_ISREG(found.st_mode)

    def is_unchanged(self) -> bool:
        """Whether the file is still there, the same, and can be read."""
        with self._open() as fd:
            return fd >= 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`; zeros behind the end, and where the file can no longer be read."""
        buffer[:] = bytes(len(buffer))
        with self._open() as fd:
            while fd >= 0 and len(buffer) and offset < self.record.size:
                try:
                    done = os.preadv(fd, [buffer], offset)
                except OSError:
                    return
                if not done:
                    return
                buffer, offset = buffer[done:], offset + done

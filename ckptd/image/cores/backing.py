# SPDX-License-Identifier: LGPL-2.1-or-later
"""BackingFile: bytes of a mapped file that the image does not have, from the file itself while it is still the same."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ckptd.image.records import Backing

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: what was a file may have become a FIFO since it was looked at
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class BackingFile:
    """A file named by a Backing record. It is opened for each piece and never held: a thousand libraries cost no fds.

    The export may read images, which whoever asks for it may not, and he may have made this one up: a file that he may
    stat(2) is not one that he may read. So it is opened by his ids alone; root's open everything, and as the owner of
    the image may put a symbolic link anywhere on a path of his, and that of a mapping has none, none is followed.
    outside: the block that does it.
    """

    def __init__(self, record: Backing, outside: Callable[[], AbstractContextManager[None]]) -> None:
        self.record, self._outside = record, outside

    @contextmanager
    def _open(self) -> Iterator[int]:
        """An fd; -1 where the path leads to nothing or to another file."""
        fd = self._open_same()
        try:
            yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    def _open_same(self) -> int:
        path = os.fsencode(self.record.path)
        if not path.startswith(b'/'):
            return -1
        try:
            with self._outside():
                fd = _open_without_links(path)
        except (OSError, ValueError):       # ValueError: a zero byte in a path, from a hostile image
            return -1
        if fd >= 0 and not self._is_same(os.fstat(fd)):
            os.close(fd)
            return -1
        return fd

    def _is_same(self, found: os.stat_result) -> bool:
        record = self.record
        return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) == (
            record.device, record.inode, record.size, record.mtime)

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


def _open_without_links(path: bytes) -> int:
    """A regular file for reading, no component of its path a symbolic link; -1 where it is no regular file."""
    *directories, name = [part for part in path.split(b'/') if part] or [b'.']
    at = os.open('/', _DIRECTORY)
    try:
        for part in directories:
            below = os.open(part, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
        if not stat.S_ISREG(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
            return -1
        return os.open(name, _FILE, dir_fd=at)
    finally:
        os.close(at)

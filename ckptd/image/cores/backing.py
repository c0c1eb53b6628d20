# SPDX-License-Identifier: LGPL-2.1-or-later
"""BackingFile: bytes of a mapped file that are not in the image, read from the file itself while it is unchanged."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from ckptd.image.records import Backing

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: the file may have been replaced by a FIFO since it was checked
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class BackingFile:
    """A file named by a Backing record. It is opened for each piece and not held, so a thousand libraries cost no fds.

    The export may read images that the caller may not read. The caller may also have made this image up, and may be
    able to stat(2) files that they cannot read. So the file is opened with the caller's ids only. Root may open
    everything, but the owner of the image could put symbolic links on a path of theirs. The path of a mapping has none,
    so none is followed. outside: the block that sets the ids.
    """

    def __init__(self, record: Backing, outside: Callable[[], AbstractContextManager[None]]) -> None:
        self.record, self._outside = record, outside

    @contextmanager
    def _open(self) -> Iterator[int]:
        """Open the file. The fd is -1 if the path leads to nothing or to another file."""
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
        except (OSError, ValueError):       # ValueError: a zero byte in a path from a hostile image
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
        """Whether the file still exists, is unchanged, and can be read."""
        with self._open() as fd:
            return fd >= 0

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`. Bytes behind the end, or that can no longer be read, are zeros."""
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
    """Open a regular file for reading if no component of its path is a symbolic link; -1 if it is not a regular
    file."""
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Named files that the tree writes, saved in their state at the freeze: checkpoint --save-files."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from ckptd.image.files import spooling
from ckptd.image.pages import DataWriter
from ckptd.kernel.copyrange import copy_range, data_ranges
from ckptd.objects.files.base import OpenFile
from ckptd.objects.files.content import ContentSegment, open_quietly

Inode = tuple[int, int]


class Unsaved(NamedTuple):
    """A file that was not saved. why: words that follow the name, 'has 5,000 bytes, more than ...'."""
    file: OpenFile
    errno: str
    why: str


class SavedFiles:
    """The data of saved files, each once, at most `limit` bytes in all (0: none), without holes.

    They go into the data part by reflink if it is on the same file system and that supports it, else by the kernel's
    copy.
    """

    def __init__(self, data: DataWriter, limit: int) -> None:
        self._data, self._limit = data, limit
        self._room = limit
        self._written: set[Inode] = set()
        self._read: dict[Inode, OpenFile] = {}      # for each file with one, a description that is open for reading
        self._done: dict[Inode, tuple[ContentSegment, ...] | None] = {}
        self.unsaved: list[Unsaved] = []

    def enter(self, file: OpenFile) -> None:
        """Note a description of the tree."""
        if file.writable:
            self._written.add(_inode(file))
        if not file.unread and not file.is_path and not (file.readable and self._is_known(file)):
            self._read[_inode(file)] = file

    def _is_known(self, file: OpenFile) -> bool:
        known = self._read.get(_inode(file))
        return known is not None and known.readable

    def written(self, file: OpenFile) -> bool:
        """Whether any description of the tree may write the file."""
        return _inode(file) in self._written

    def reads(self, file: OpenFile) -> bool:
        """Whether the tree or the user who checkpoints it may read the file. If not, it is added to `unsaved`."""
        key = _inode(file)
        if key in self._read:
            return True
        if self._limit and key not in self._done:
            self._done[key] = None
            self.unsaved.append(Unsaved(file, 'EACCES', 'is writable, but not readable'))
        return False

    def save(self, file: OpenFile) -> tuple[ContentSegment, ...] | None:
        """Save the data of a file. If it is not saved, return None and add the reason to `unsaved`. SpoolFailed."""
        if not self._limit:
            return None
        key = _inode(file)
        if key not in self._done:
            try:
                self._done[key] = self._save(file)
            except PermissionError:
                self._done[key] = None
                self.unsaved.append(Unsaved(file, 'EACCES', 'is not readable'))
        return self._done[key]

    def _save(self, file: OpenFile) -> tuple[ContentSegment, ...] | None:
        with self._reading(file) as fd:
            ranges = list(data_ranges(fd, file.stat.st_size))
            size = sum(end - start for start, end in ranges)
            if size > self._room:
                why = f'has {size:,} bytes, and {self._room:,} of the limit are left'
                self.unsaved.append(Unsaved(file, 'EFBIG', why))
                return None
            self._room -= size
            return tuple(self._copy(fd, start, end) for start, end in ranges)

    @contextmanager
    def _reading(self, file: OpenFile) -> Iterator[int]:
        """Return an fd to read a file: opened anew or, if we may not open it, that of the tree."""
        with ExitStack() as stack:
            try:
                fd = stack.enter_context(open_quietly(file))
            except PermissionError:
                if not self._is_known(file):
                    raise
                fd = stack.enter_context(self._read[_inode(file)].duplicate())
            yield fd

    def _copy(self, fd: int, start: int, end: int) -> ContentSegment:
        extent = self._data.reserve(end - start)
        with spooling(self._data.path):
            copy_range(fd, start, end - start, self._data.fileno(), extent.offset)
        return ContentSegment(start, extent)


def _inode(file: OpenFile) -> Inode:
    return file.stat.st_dev, file.stat.st_ino

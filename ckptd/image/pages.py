# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bulk bytes of an image: data-N.img, written at reserved page-aligned offsets, and the page runs that refer to
them."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ckptd.fileio import pwrite_all
from ckptd.image.files import create, require_room, spooling
from ckptd.image.records import PAGE, Extent, PageRun, PageRuns, data_name

RUNS_PER_RECORD = 1 << 16       # 1.4 MiB a record


def page_align(length: int) -> int:
    """Round `length` up to whole pages."""
    return -(-length // PAGE) * PAGE


def page_runs(owner_kind: int, owner: int, runs: Sequence[PageRun]) -> Iterator[PageRuns]:
    """Yield the records for all runs of one owner, each within the size limit of a record."""
    for first in range(0, len(runs), RUNS_PER_RECORD):
        yield PageRuns(owner_kind, owner, tuple(runs[first:first + RUNS_PER_RECORD]))


class DataWriter:
    """The writer of one data-N.img. Threads reserve extents and write into them, by `pwrite` or by pwrite(2) on
    `fileno`.

        with spooling(data.path):                       # a full disk: SpoolFailed
            libc.pwritev(data.fileno(), iov, ..., data.reserve(length).offset)

    An extent that was reserved and not written reads as zeros. keep_free: bytes of the file system that must stay free.
    This is checked when an extent is reserved and again when it is written, since others write, too.
    """

    def __init__(self, directory: Path, part: int, keep_free: int = 0) -> None:
        self.path = directory / data_name(part)
        self.part, self._keep_free = part, keep_free
        self._end = 0
        self._lock = threading.Lock()
        with spooling(self.path):
            self._fd = create(self.path)

    def fileno(self) -> int:
        return self._fd

    @property
    def size(self) -> int:
        """Bytes reserved so far."""
        return self._end

    def reserve(self, length: int) -> Extent:
        """Reserve `length` bytes at the next page boundary. SpoolFailed."""
        self._require_room(length)
        with self._lock:
            return self._take(length)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write into a reserved extent. SpoolFailed."""
        self._require_room(len(memoryview(data).cast('B')))
        with spooling(self.path):
            pwrite_all(self._fd, data, offset)

    def add(self, chunks: Iterable[bytes | bytearray | memoryview]) -> Extent:
        """Write all `chunks` as one extent. Other threads' reservations wait. SpoolFailed."""
        with self._lock:
            start, length = self._end, 0
            for chunk in chunks:
                self.pwrite(chunk, start + length)
                length += len(memoryview(chunk).cast('B'))
            return self._take(length)

    def _require_room(self, length: int) -> None:
        if self._keep_free:
            require_room(self.path, length, self._keep_free, at=self._fd)

    def _take(self, length: int) -> Extent:
        extent = Extent(self.part, self._end, length)
        self._end += page_align(length)
        return extent

    def finish(self) -> None:
        """Give the file its full size. The last page is completed for mmap(2) and preadv(2) of whole pages."""
        with spooling(self.path):
            os.ftruncate(self._fd, self._end)

    def close(self) -> None:
        """Close the file. A network file system reports a full disk only here. SpoolFailed."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with spooling(self.path):
                os.close(fd)

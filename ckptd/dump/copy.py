# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copy page data into the image: one thread reads the next chunk while another writes the last.

process_vm_readv(2) and pwrite(2) both run without the interpreter's lock, so the two overlap. The kernel copies each
byte twice, and no page passes through a Python object.
"""

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from ckptd.image.pages import DataWriter
from ckptd.image.records import Extent, PageRun
from ckptd.kernel.copyrange import data_ranges
from ckptd.kernel.memory import IOV_MAX, PAGE, Mem, Range, differing, read_into

CHUNK_SIZE = 512 << 10     # small enough that a chunk is still in the cache when it is written
BUFFERS = 4
MAX_SKIP = 16              # chunks that are not compared after one that has changed
MAX_PIECES = 32            # runs of changed pages in a chunk that are worth a write(2) each


class _Buffer:
    """CHUNK_SIZE bytes for both ctypes and pwrite."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, CHUNK_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))


class Copier:
    """A copier of the memory of stopped processes to a data part. on_bytes(n) is called after each chunk, for progress
    and cancel.

    Leaving the `with` waits for the writer. An error of a write (SpoolFailed) is raised by the next copy or by `flush`.
    """

    def __init__(self, data: DataWriter, on_bytes: Callable[[int], None]) -> None:
        self.data, self._on_bytes = data, on_bytes
        self._pool = ThreadPoolExecutor(1, 'write')
        self._free = deque(_Buffer() for _ in range(BUFFERS))
        self._origin = _Buffer()
        self._busy: deque[tuple[Future[None], _Buffer]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Buffers are unmapped with the last reference. The traceback of a failed write holds a slice of one, and
        # closing that would be a BufferError.
        self._pool.shutdown(wait=True, cancel_futures=True)

    def flush(self) -> None:
        """Wait until everything is written. SpoolFailed."""
        while self._busy:
            self._reclaim()

    def _reclaim(self) -> None:
        future, buffer = self._busy.popleft()
        self._free.append(buffer)
        future.result()

    def _take(self) -> _Buffer:
        if not self._free:
            self._reclaim()
        return self._free.popleft()

    def _write(self, buffer: _Buffer, length: int, offset: int) -> None:
        """Pass a full buffer to the writing thread."""
        self._busy.append((self._pool.submit(self.data.pwrite, buffer.view[:length], offset), buffer))
        self._on_bytes(length)

    def copy_memory(self, mem: Mem, ranges: Sequence[Range], *, base: int = 0) -> list[PageRun]:
        """Copy page-aligned ranges of a process. Return the runs, whose start is the address minus `base`."""
        extent = self.data.reserve(sum(end - start for start, end in ranges))
        offset = extent.offset
        for chunk in _chunks(ranges):
            buffer = self._take()
            length = _read(mem, chunk, buffer)
            self._write(buffer, length, offset)
            offset += length
        return _runs(ranges, extent, base)

    def copy_changed(self, mem: Mem, origin: Mem, runs: Sequence[PageRun]) -> list[PageRun]:
        """Copy what differs from process `origin`, whose pages have the same addresses and are already in the image at
        `runs`. Equal parts keep the runs of `origin`. The result is ascending.

        After a chunk that has mostly changed, or in too many places, the next ones are copied without a comparison,
        each time twice as many. So where everything differs, comparing costs next to nothing.
        """
        made: list[PageRun] = []
        skip, skipped = 1, 0
        for chunk in _run_chunks(runs):
            ranges = [(run.start, run.start + run.pages * PAGE) for run in chunk]
            buffer = self._take()
            length = _read(mem, ranges, buffer)
            if skipped > 0:
                skipped -= 1
                changed = [(0, length)]
            else:
                _read(origin, ranges, self._origin)
                changed = differing(buffer.address, self._origin.address, length)
                if len(changed) > MAX_PIECES:
                    changed = [(0, length)]
                many = 2 * sum(end - start for start, end in changed) > length
                skip, skipped = (min(2 * skip, MAX_SKIP), skip) if many else (1, 0)
            made += self._write_changed(buffer, changed, chunk, length)
        return list(_joined(made))

    def _write_changed(self, buffer: _Buffer, changed: Sequence[Range], chunk: Sequence[PageRun],
                       length: int) -> Iterable[PageRun]:
        """Write the changed parts of a full buffer. Return the runs of the whole buffer."""
        if not changed:
            self._free.append(buffer)
            self._on_bytes(length)
            return chunk
        extent = self.data.reserve(sum(end - start for start, end in changed))
        views = [buffer.view[start:end] for start, end in changed]
        self._busy.append((self._pool.submit(self._pwrite, views, extent.offset), buffer))
        self._on_bytes(length)
        return _changed_runs(chunk, changed, extent)

    def _pwrite(self, views: Iterable[memoryview], offset: int) -> None:
        for view in views:
            self.data.pwrite(view, offset)
            offset += len(view)

    def copy_file(self, fd: int, size: int, ranges: Iterable[Range] | None = None) -> list[PageRun]:
        """Copy the data of a file or shared object, without its holes, or only these ranges of whole pages. Return the
        runs of whole pages, by byte offset."""
        ranges = list(_page_ranges(fd, size) if ranges is None else ranges)
        extent = self.data.reserve(sum(end - start for start, end in ranges))
        offset = extent.offset
        for chunk in _chunks(ranges):
            buffer, length = self._take(), 0
            for start, end in chunk:
                view = buffer.view[length:length + end - start]
                done = os.preadv(fd, [view], start)
                view[done:] = bytes(len(view) - done)  # the end of the last page, or a part that was cut off meanwhile
                length += end - start
            self._write(buffer, length, offset)
            offset += length
        return _runs(ranges, extent, 0)

    def copy_whole(self, fd: int, size: int) -> Extent:
        """Copy a file as one extent. Its holes are holes in the data part, too, so they take no space."""
        extent = self.data.reserve(size)
        for start, end in _page_ranges(fd, size):
            for at in range(start, end, CHUNK_SIZE):
                buffer, length = self._take(), min(CHUNK_SIZE, end - at)
                done = os.preadv(fd, [buffer.view[:length]], at)
                buffer.view[done:length] = bytes(length - done)
                self._write(buffer, length, extent.offset + at)
        return extent


def _page_ranges(fd: int, size: int) -> Iterator[Range]:
    """Yield the ranges of pages of a file that may have data. They do not overlap."""
    done = 0
    for start, end in data_ranges(fd, size):
        start, end = max(start // PAGE * PAGE, done), -(-end // PAGE) * PAGE
        if start < end:
            yield start, end
            done = end


def _chunks(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Group the ranges so that each group fits into a buffer and into one process_vm_readv."""
    group: list[Range] = []
    room = CHUNK_SIZE
    for start, end in ranges:
        while start < end:
            stop = min(end, start + room)
            group.append((start, stop))
            room -= stop - start
            start = stop
            if not room or len(group) == IOV_MAX:
                yield group
                group, room = [], CHUNK_SIZE
    if group:
        yield group


def _read(mem: Mem, ranges: Sequence[Range], buffer: _Buffer) -> int:
    """Fill the buffer. Return the bytes read. Pages without read permission are read through /proc/PID/mem, as a tracer
    may."""
    total = sum(end - start for start, end in ranges)
    try:
        done = read_into(mem.pid, ranges, buffer.address)
    except OSError:
        done = 0
    if done < total:
        at = 0
        for start, end in ranges:
            buffer.view[at:at + end - start] = mem.read(start, end - start)
            at += end - start
    return total


def _runs(ranges: Sequence[Range], extent: Extent, base: int) -> list[PageRun]:
    runs, offset = [], extent.offset
    for start, end in ranges:
        runs.append(PageRun(start - base, (end - start) // PAGE, extent.part, offset))
        offset += end - start
    return runs


def _run_chunks(runs: Iterable[PageRun]) -> Iterator[list[PageRun]]:
    """Group the runs so that each group fits into a buffer."""
    group: list[PageRun] = []
    room = CHUNK_SIZE // PAGE
    for run in runs:
        done = 0
        while done < run.pages:
            pages = min(run.pages - done, room)
            group.append(part_of(run, done, pages))
            done, room = done + pages, room - pages
            if not room or len(group) == IOV_MAX:
                yield group
                group, room = [], CHUNK_SIZE // PAGE
    if group:
        yield group


def part_of(run: PageRun, first: int, pages: int) -> PageRun:
    """Return the `pages` pages of a run from its page `first` on."""
    return PageRun(run.start + first * PAGE, pages, run.part, run.offset + first * PAGE)


def _changed_runs(chunk: Iterable[PageRun], changed: Iterable[Range], extent: Extent) -> Iterator[PageRun]:
    """Yield the runs of a chunk. Changed byte ranges of it are stored one after the other at `extent`."""
    left = deque(changed)
    at, offset = 0, extent.offset           # in the chunk, in the extent
    for run in chunk:
        done = 0
        while done < run.pages:
            while left and left[0][1] <= at:
                left.popleft()
            inside = bool(left) and left[0][0] <= at
            until = left[0][int(inside)] if left else at + (run.pages - done) * PAGE
            pages = min((until - at) // PAGE, run.pages - done)
            part = part_of(run, done, pages)
            if inside:
                part = PageRun(part.start, pages, extent.part, offset)
                offset += pages * PAGE
            yield part
            done, at = done + pages, at + pages * PAGE


def _joined(runs: Iterable[PageRun]) -> Iterator[PageRun]:
    """Join runs whose memory and bytes both continue those of the previous run."""
    last: PageRun | None = None
    for run in runs:
        if last and (last.start + last.pages * PAGE, last.part, last.offset + last.pages * PAGE) == \
                (run.start, run.part, run.offset):
            last = PageRun(last.start, last.pages + run.pages, last.part, last.offset)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last

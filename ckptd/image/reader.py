# SPDX-License-Identifier: LGPL-2.1-or-later
"""ImageReader: the records of one image by type and id, and its bulk bytes. It trusts nothing: errors are
ImageDamaged."""

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, cast

from ckptd.errors import ImageDamaged
from ckptd.image.grammar import Record, read_records
from ckptd.image.manifest import read_manifest_of
from ckptd.image.records import (
    OF_MM,
    OF_SHARED_MEMORY,
    PAGE,
    PARTS,
    Extent,
    GuardRegions,
    Header,
    Mm,
    PageRun,
    PageRuns,
    Range,
    TaskIds,
    TaskRecord,
    Vma,
    data_name,
)
from ckptd.image.shapes import flaws, tree_flaws
from ckptd.image.source import ImageFiles, files_of, open_part

R = TypeVar('R', bound=Record)
CHUNK = 1 << 20     # bytes of an extent held in memory at a time


@dataclass(frozen=True, slots=True)
class ImageTask:
    """A task with its ids. Tasks are in depth-first order in the image."""
    vpid: int
    vtgid: int
    vppid: int
    vpgid: int
    vsid: int
    record: TaskRecord

    @property
    def is_leader(self) -> bool:
        return self.vpid == self.vtgid


@dataclass(frozen=True, slots=True)
class Memory:
    """An address space: its VMAs, the locations of its pages in the data parts, and its guard regions, all
    ascending."""
    mm: Mm
    vmas: tuple[Vma, ...]
    runs: tuple[PageRun, ...]
    guards: tuple[Range, ...]


class _Index:
    """Records of one part by class, and for each class by id (the first field)."""

    def __init__(self, name: str, records: Iterator[Record]) -> None:
        self.lists: dict[type[Record], list[Record]] = defaultdict(list)
        for one in records:
            self.lists[type(one)].append(one)
        self.name = name

    def table(self, cls: type[Record]) -> dict[int, Record]:
        key = fields(cast(Any, cls))[0].name
        table = {getattr(one, key): one for one in self.lists[cls]}
        if len(table) != len(self.lists[cls]):
            raise ImageDamaged(f'{self.name}: two {cls.__name__} records have the same {key}', resource=self.name)
        return table


class ImageReader:
    """An open image. Parts are read on first use. outside: a block in which files outside of the image are opened.
    records: those of each part, if `verify` has read and accepted them."""

    def __init__(self, image: Path | ImageFiles, outside: Callable[[], AbstractContextManager[None]] = nullcontext,
                 records: Mapping[str, Sequence[Record]] = MappingProxyType({})) -> None:
        self.outside, self._verified = outside, records
        self._stack = ExitStack()
        self._files = self._stack.enter_context(files_of(image))
        self._data: dict[int, int] = {}
        self._indices: dict[str, _Index] = {}
        self._tables: dict[type[Record], Mapping[int, Record]] = {}
        try:
            self.manifest = read_manifest_of(self._files)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file. A second call does nothing."""
        for fd in self._data.values():
            os.close(fd)
        self._data.clear()
        self._stack.close()

    # ------------------------------------------------------------ records

    def records(self, code: str) -> Iterator[Record]:
        """Yield the records of the part 'TREE', 'TASK', 'FILE' or 'MEM ' in order, one in memory at a time."""
        name = PARTS[code]
        with open_part(self._files, name) as file:
            try:
                for one in read_records(file, code.encode(), name):
                    for flaw in flaws(one):
                        raise ImageDamaged(f'{name}: {type(one).__name__}: {flaw}', resource=name)
                    yield one
            except OSError as error:
                raise ImageDamaged(f'{name} cannot be read: {error.strerror}', resource=name) from error

    def every(self, cls: type[R]) -> Sequence[R]:
        """Return all records of a class in order."""
        return cast(Sequence[R], self._index(cls).lists[cls])

    def table(self, cls: type[R]) -> Mapping[int, R]:
        """Return all records of a class by id: the first field, a vpid or mm_id or file_id ..."""
        found = self._tables.get(cls)
        if found is None:
            found = self._tables[cls] = self._index(cls).table(cls)
        return cast(Mapping[int, R], found)

    def get(self, cls: type[R], key: int) -> R:
        """Return the record of that id. ImageDamaged if the image has none."""
        found = self.table(cls).get(key)
        if found is None:
            name = part_code(cls)
            raise ImageDamaged(f'{PARTS[name]}: no {cls.__name__} {key}', resource=PARTS[name])
        return found

    def _index(self, cls: type[Record]) -> _Index:
        code = part_code(cls)
        if code not in self._indices:
            known = self._verified.get(code)
            self._indices[code] = _Index(PARTS[code], self.records(code) if known is None else iter(known))
        return self._indices[code]

    # ------------------------------------------------------------ views

    @cached_property
    def header(self) -> Header:
        headers = self.every(Header)
        if len(headers) != 1:
            raise ImageDamaged(f'{PARTS["TREE"]}: {len(headers)} headers', resource=PARTS['TREE'])
        return headers[0]

    @cached_property
    def tasks(self) -> tuple[ImageTask, ...]:
        """Every task, in depth-first order."""
        tasks = self.table(TaskRecord)
        made = []
        for chunk in self.every(TaskIds):
            lists = (chunk.vpid, chunk.vtgid, chunk.vppid, chunk.vpgid, chunk.vsid)
            if len({len(one) for one in lists}) != 1:
                raise ImageDamaged(f'{PARTS["TREE"]}: the lists of TaskIds differ in length', resource=PARTS['TREE'])
            made += [ImageTask(*ids, self.get(TaskRecord, ids[0])) for ids in zip(*lists, strict=True)]
        if len(made) != len(tasks) or len({task.vpid for task in made}) != len(made):
            raise ImageDamaged(f'{PARTS["TREE"]}: TaskIds and TaskRecord records differ', resource=PARTS['TREE'])
        for flaw in tree_flaws((task.vpid, task.vtgid, task.record.parent) for task in made):
            raise ImageDamaged(f'{PARTS["TREE"]}: {flaw}', resource=PARTS['TREE'])
        return tuple(made)

    @cached_property
    def processes(self) -> Mapping[int, tuple[ImageTask, ...]]:
        """The tasks of each process by vtgid, the leader first, in the order of the leaders."""
        groups: dict[int, list[ImageTask]] = defaultdict(list)
        for task in self.tasks:
            groups[task.vtgid].append(task)
        return {vtgid: tuple(sorted(group, key=lambda task: not task.is_leader)) for vtgid, group in groups.items()}

    def memory(self, mm_id: int) -> Memory:
        """Return the address space `mm_id`."""
        vmas = sorted(self._by_mm.get(mm_id, ()), key=lambda vma: vma.start)
        guards = sorted(self._guards_by_mm.get(mm_id, ()), key=lambda one: one.start)
        return Memory(self.get(Mm, mm_id), tuple(vmas), self.runs(OF_MM, mm_id), tuple(guards))

    def runs(self, owner_kind: int, owner: int) -> tuple[PageRun, ...]:
        """Return the page runs of an address space or shared object, ascending."""
        return self._runs.get((owner_kind, owner), ())

    def shared_runs(self, shm_id: int) -> tuple[PageRun, ...]:
        """Return the page runs of a SharedMemory object. `start` is a byte offset into it."""
        return self.runs(OF_SHARED_MEMORY, shm_id)

    @cached_property
    def _by_mm(self) -> Mapping[int, list[Vma]]:
        groups: dict[int, list[Vma]] = defaultdict(list)
        for vma in self.every(Vma):
            groups[vma.mm_id].append(vma)
        return groups

    @cached_property
    def _guards_by_mm(self) -> Mapping[int, list[Range]]:
        groups: dict[int, list[Range]] = defaultdict(list)
        for regions in self.every(GuardRegions):
            groups[regions.mm_id] += regions.ranges
        return groups

    @cached_property
    def _runs(self) -> Mapping[tuple[int, int], tuple[PageRun, ...]]:
        groups: dict[tuple[int, int], list[PageRun]] = defaultdict(list)
        for chunk in self.every(PageRuns):
            groups[chunk.owner_kind, chunk.owner] += chunk.runs
        return {key: tuple(sorted(runs, key=lambda run: run.start)) for key, runs in groups.items()}

    # ------------------------------------------------------------ bulk bytes

    def size_of(self, name: str) -> int:
        """Return the size in bytes of a file of the image from the manifest; 0 if it is not listed."""
        part = self.manifest.parts.get(name)
        return part.size if part else 0

    def data_fd(self, part: int) -> int:
        """Return an fd of data-<part>.img, open for reading. The reader owns it, so do not close it."""
        if part not in self._data:
            name = data_name(part)
            if name not in self.manifest.parts:
                raise ImageDamaged(f'{name} is named by a record but not by the manifest', resource=name)
            self._data[part] = self._files.open(name)
        return self._data[part]

    def pread_into(self, buffer: memoryview, part: int, offset: int) -> None:
        """Fill `buffer` with the bytes at `offset` of a data part."""
        name, fd = data_name(part), self.data_fd(part)
        while len(buffer):
            try:
                done = os.preadv(fd, [buffer], offset)
            except (OSError, OverflowError) as error:
                raise ImageDamaged(f'{name} cannot be read at byte {offset}: {error}', resource=name) from error
            if not done:
                raise ImageDamaged(f'{name} ends at byte {offset}, before the end that a record claims', resource=name)
            buffer, offset = buffer[done:], offset + done

    def read_memory(self, memory: Memory, start: int, length: int) -> bytes:
        """Read private memory at an address, for small lengths. Absent pages are zeros."""
        found = bytearray(length)
        for run in runs_between(memory.runs, start, start + length):
            low, high = max(run.start, start), min(run.start + run.pages * PAGE, start + length)
            self.pread_into(memoryview(found)[low - start:high - start], run.part, run.offset + low - run.start)
        return bytes(found)

    def read_extent(self, extent: Extent) -> Iterator[bytes]:
        """Yield the bytes of an extent in chunks of at most 1 MiB, whatever length the record claims."""
        at, end = extent.offset, extent.offset + extent.length
        while at < end:
            chunk = bytearray(min(CHUNK, end - at))
            self.pread_into(memoryview(chunk), extent.part, at)
            yield bytes(chunk)
            at += len(chunk)


def runs_between(runs: Sequence[PageRun], start: int, end: int) -> Iterator[PageRun]:
    """Yield the runs that touch [start, end). `runs` is ascending."""
    # a run that begins before `start` may reach into the range
    first = max(0, bisect_right(runs, start, key=attrgetter('start')) - 1)
    for index in range(first, len(runs)):
        if runs[index].start >= end:
            return
        if runs[index].start + runs[index].pages * PAGE > start:
            yield runs[index]


def part_code(cls: type[Record]) -> str:
    """Return the code of the part that has the records of a class. The high byte of their tag counts the parts."""
    return list(PARTS)[cls.tag >> 8]

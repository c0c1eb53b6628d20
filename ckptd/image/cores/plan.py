# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a core: the position of each byte of an image in an ELF core, before any is written.

    ELF header, program headers (, section header 0 for 65,535 and more of them)
    PT_NOTE                 see notes.py
    PT_LOAD per VMA         page-aligned; absent pages are holes of the file

The content of a PT_LOAD for each type of VMA, mostly as in core(5):

    private and shared memory       all, if the image has a page of it; else p_filesz 0
    private file, changed           all: changed pages from the image, the others from the file. If the file is gone
                                    or changed, a PT_LOAD for each changed piece, so that nothing is shown as zeros
    file, deleted                   all: no other copy exists
    file, unchanged                 the first page if it is an ELF header: debuggers find the file by its build id
    vvar, vsyscall, MADV_DONTDUMP   nothing
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckptd.errors import ImageDamaged, NoSuchTarget
from ckptd.image.cores.backing import BackingFile
from ckptd.image.cores.elf import EM_X86_64, PT_LOAD, PT_NOTE, Phdr, encode_headers, headers_size
from ckptd.image.cores.notes import encode_notes
from ckptd.image.pages import page_align
from ckptd.image.reader import ImageReader, ImageTask, Memory, runs_between
from ckptd.image.records import (
    FILE_PRIVATE,
    FILE_SHARED,
    PAGE,
    SHARED_MEMORY,
    VSYSCALL,
    VVAR,
    Backing,
    PageRun,
    Registers,
    Vma,
)

MAX_CORE = 1 << 62      # bytes, including holes; below the limit of off_t
_DEAD = (ord('Z'), ord('X'))
_ELF_MAGIC = b'\x7fELF'


class Source(Protocol):
    """A source of bytes for a core."""
    def read_into(self, buffer: memoryview, offset: int) -> None: ...


@dataclass(frozen=True, slots=True)
class DataSource:
    """A data part of the image."""
    reader: ImageReader
    part: int

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.reader.pread_into(buffer, self.part, offset)


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` bytes for byte `at` of the core (or of its segment), from `offset` of `source`."""
    at: int
    length: int
    source: Source
    offset: int


@dataclass(frozen=True, slots=True)
class CoreSegment:
    """A future PT_LOAD: [start, end), of which the first `filesz` bytes are in the core. Bytes without a piece are
    zero."""
    start: int
    end: int
    protection: int
    filesz: int = 0
    pieces: Sequence[Piece] = ()

    @property
    def flags(self) -> int:
        """PF_*: PROT_* with read and execute swapped."""
        return (self.protection & 1) << 2 | self.protection & 2 | (self.protection & 4) >> 2


class Core:
    """The plan of one core: its head (headers and notes), its pieces in ascending order, and its size."""

    def __init__(self, reader: ImageReader, tasks: Sequence[ImageTask]) -> None:
        memory = reader.memory(tasks[0].record.mm_id)
        self._segments = tuple(segments(reader, memory))
        notes = encode_notes(reader, tasks, memory)
        count = len(self._segments) + 1
        self._data_start = page_align(headers_size(count) + len(notes))
        phdrs = [Phdr(PT_NOTE, 4, headers_size(count), 0, len(notes), 0, 4), *self._loads()]
        machine = reader.get(Registers, tasks[0].vpid).machine or EM_X86_64
        self.head = encode_headers(machine, phdrs) + notes
        self.size = self._data_start + sum(segment.filesz for segment in self._segments)

    def _loads(self) -> Iterator[Phdr]:
        at = self._data_start
        for one in self._segments:
            yield Phdr(PT_LOAD, one.flags, at, one.start, one.filesz, one.end - one.start, PAGE)
            at += one.filesz
            if at > MAX_CORE:
                raise ImageDamaged(f'memory.img: a VMA of {one.filesz} bytes', resource='memory.img')

    def pieces(self) -> Iterator[Piece]:
        """Yield everything after the head that is not a hole."""
        at = self._data_start
        for segment in self._segments:
            for piece in segment.pieces:
                yield Piece(at + piece.at, piece.length, piece.source, piece.offset)
            at += segment.filesz


def exportable(reader: ImageReader) -> list[int]:
    """Return the vtgid of each process that had memory. Zombies have no core."""
    return [vtgid for vtgid in reader.processes if _living(reader, vtgid)]


def plan_core(reader: ImageReader, vpid: int) -> Core:
    """Plan the core of one process. NoSuchTarget if the image has no such process, or it was a zombie."""
    tasks = _living(reader, vpid)
    if not tasks:
        raise NoSuchTarget(f'the image has no living process {vpid}', resource=f'vpid {vpid}',
                           hint='run "ckptctl tree IMAGE" to see what is in it')
    return Core(reader, tasks)


def _living(reader: ImageReader, vtgid: int) -> list[ImageTask]:
    # a leader that called pthread_exit is a zombie without registers while other threads live on
    return [task for task in reader.processes.get(vtgid, ()) if task.record.state not in _DEAD and task.record.mm_id]


# ---------------------------------------------------------------- segments

def segments(reader: ImageReader, memory: Memory) -> Iterator[CoreSegment]:
    """Yield the PT_LOADs for every VMA of an address space."""
    for vma in memory.vmas:
        if vma.start >= vma.end or vma.start % PAGE or vma.end % PAGE:
            raise ImageDamaged(f'memory.img: a VMA {vma.start:x}-{vma.end:x}', resource='memory.img')
        if vma.kind in (VVAR, VSYSCALL) or 'dd' in vma.vm_flags.split():
            yield CoreSegment(vma.start, vma.end, vma.protection)
        elif vma.kind in (FILE_PRIVATE, FILE_SHARED):
            yield from _file_segments(reader, memory, vma)
        elif vma.kind == SHARED_MEMORY:
            yield _whole(vma, _clip(reader, reader.shared_runs(vma.object), vma.offset, vma.end - vma.start))
        else:
            yield _whole(vma, _clip(reader, memory.runs, vma.start, vma.end - vma.start))


def _whole(vma: Vma, pieces: list[Piece]) -> CoreSegment:
    return CoreSegment(vma.start, vma.end, vma.protection, vma.end - vma.start if pieces else 0, pieces)


def _clip(reader: ImageReader, runs: Sequence[PageRun], start: int, length: int) -> list[Piece]:
    """Return what `runs` contain of [start, start + length), as pieces relative to `start`."""
    pieces, done = [], start
    for run in runs_between(runs, start, start + length):
        if run.start % PAGE:
            raise ImageDamaged(f'memory.img: a page at {run.start:x}', resource='memory.img')
        # runs of a hostile image may overlap, but a core is written forward only
        low, high = max(run.start, done), min(run.start + run.pages * PAGE, start + length)
        if low < high:
            pieces.append(Piece(low - start, high - low, DataSource(reader, run.part), run.offset + low - run.start))
            done = high
    return pieces


def _file_segments(reader: ImageReader, memory: Memory, vma: Vma) -> Iterator[CoreSegment]:
    changed = _clip(reader, memory.runs, vma.start, vma.end - vma.start) if vma.kind == FILE_PRIVATE else []
    backing = reader.get(Backing, vma.object)
    file = _file_pieces(reader, backing, vma)
    if backing.deleted:
        yield _whole(vma, list(_overlay(file, changed)))
    elif not changed:
        first = file[:1] if vma.offset == 0 and _is_elf(file) else []
        yield CoreSegment(vma.start, vma.end, vma.protection, PAGE if first else 0,
                          [Piece(0, min(PAGE, one.length), one.source, one.offset) for one in first])
    elif file:
        yield _whole(vma, list(_overlay(file, changed)))
    else:
        yield from _alone(vma, changed)


def _file_pieces(reader: ImageReader, backing: Backing, vma: Vma) -> list[Piece]:
    """Return the mapped bytes as they are in the file, from `vma.offset` on; none if they are no longer available."""
    if not backing.deleted:
        file = BackingFile(backing, reader.outside)
        length = min(vma.end - vma.start, page_align(max(0, backing.size - vma.offset)))
        return [Piece(0, length, file, vma.offset)] if length and file.is_unchanged() else []
    pieces, at = [], 0
    for extent in backing.content:
        if at % PAGE:
            raise ImageDamaged(f'memory.img: Backing {backing.backing_id} has half a page', resource='memory.img')
        low, high = max(at, vma.offset), min(at + extent.length, vma.offset + vma.end - vma.start)
        if low < high:
            pieces.append(Piece(low - vma.offset, high - low, DataSource(reader, extent.part),
                                extent.offset + low - at))
        at += extent.length
    return pieces


def _is_elf(file: Sequence[Piece]) -> bool:
    if not file or file[0].at or file[0].length < len(_ELF_MAGIC):
        return False
    magic = bytearray(len(_ELF_MAGIC))
    file[0].source.read_into(memoryview(magic), file[0].offset)
    return magic == _ELF_MAGIC


def _overlay(below: Sequence[Piece], above: Sequence[Piece]) -> Iterator[Piece]:
    """Yield pieces of both in ascending order. Where both overlap, `above` wins."""
    at = 0
    rest = list(reversed(below))
    for piece in above:
        yield from _between(rest, at, piece.at)
        yield piece
        at = piece.at + piece.length
    yield from _between(rest, at, MAX_CORE)


def _between(stack: list[Piece], start: int, end: int) -> Iterator[Piece]:
    """Yield what the pieces on `stack` (the first on top) contain of [start, end). Pieces that end before `end` are
    popped."""
    while stack and stack[-1].at < end:
        one = stack[-1]
        low, high = max(one.at, start), min(one.at + one.length, end)
        if low < high:
            yield Piece(low, high - low, one.source, one.offset + low - one.at)
        if one.at + one.length > end:
            return
        stack.pop()


def _alone(vma: Vma, changed: Sequence[Piece]) -> Iterator[CoreSegment]:
    """Yield a segment for each changed piece and one without data for each gap. A debugger then uses the file for the
    gap."""
    at = vma.start
    for piece in changed:
        start = vma.start + piece.at
        if at < start:
            yield CoreSegment(at, start, vma.protection)
        at = start + piece.length
        yield CoreSegment(start, at, vma.protection, piece.length, [Piece(0, piece.length, piece.source, piece.offset)])
    if at < vma.end:
        yield CoreSegment(at, vma.end, vma.protection)

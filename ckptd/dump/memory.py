# SPDX-License-Identifier: LGPL-2.1-or-later
"""Address spaces: their mappings, the pages worth writing, and the places of these in the image."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from mmap import MAP_PRIVATE
from operator import attrgetter

from ckptd.dump.copy import Copier, part_of
from ckptd.dump.names import LinkNames
from ckptd.dump.remote_state import RemoteState
from ckptd.dump.vmas import vma_record
from ckptd.image import records
from ckptd.image.grammar import Record
from ckptd.image.pages import page_runs
from ckptd.image.records import OF_MM, OF_SHARED_MEMORY, PAGE, PageRun
from ckptd.kernel.maps import Mapping
from ckptd.kernel.memory import Mem, PageMap, Range
from ckptd.kernel.ranges import overlaps, without
from ckptd.kernel.stat import Stat
from ckptd.kernel.task import read_auxv
from ckptd.objects.mappings.registry import KEPT_WHOLE, KERNELS_OWN, REGIONS, MappingKinds


@dataclass(slots=True)
class _Space:
    """One address space, read through the stopped thread `tid`. origin: that of a relative, copied before, from which
    it may have been forked; 0 for none."""
    mm_id: int
    origin: int
    tid: int
    mm: records.Mm
    vmas: list[records.Vma]
    ranges: list[Range] = field(default_factory=list)
    regions: list[list[Range]] = field(default_factory=list)        # as in REGIONS
    runs: list[PageRun] = field(default_factory=list)


class MemoryDump:
    """All address spaces and shared objects of a tree: `add` each, then `scan`, `copy`, `records`."""

    def __init__(self, names: LinkNames) -> None:
        self.kinds = MappingKinds()
        self._names = names
        self._spaces: dict[int, _Space] = {}
        self._shared: list[Record] = []
        self.pages_scanned = 0
        self.pages_written = 0

    def add(self, mm_id: int, tid: int, mappings: Sequence[Mapping], stat: Stat, answers: RemoteState,
            origin: int) -> None:
        """Add an address space, once. origin: the mm_id of the parent or a sibling, which is smaller, or 0."""
        if mm_id in self._spaces:
            return
        memory = answers.memory
        layout = (stat.start_code, stat.end_code, stat.start_data, stat.end_data, stat.start_brk, memory.brk,
                  stat.start_stack, stat.arg_start, stat.arg_end, stat.env_start, stat.env_end)
        mm = records.Mm(mm_id, layout, read_auxv(tid), self.kinds.executable(tid), memory.dumpable,
                        memory.lock_future, memory.pkeys)
        vmas = [vma_record(mm_id, tid, mapping, self.kinds) for mapping in mappings]
        self._spaces[mm_id] = _Space(mm_id, origin, tid, mm, vmas)

    def scan(self) -> int:
        """Choose the pages of every address space. Return the bytes to copy (of shared objects: at most)."""
        for space in self._spaces.values():
            self._scan_space(space)
        private = sum(end - start for space in self._spaces.values() for start, end in space.ranges)
        return private + self.kinds.shared_extent

    def _scan_space(self, space: _Space) -> None:
        private = [vma for vma in space.vmas if vma.flags & MAP_PRIVATE and vma.kind not in KERNELS_OWN]
        spans = _spans(private)
        with PageMap(space.tid) as pagemap:
            chosen = pagemap.anonymous(spans)
            space.regions = [kind.scan(pagemap, spans) for kind in REGIONS]
        whole = _spans(vma for vma in space.vmas if vma.kind in KEPT_WHOLE)
        # never across the border of two mappings
        space.ranges = sorted([*((part.start, part.end) for part in overlaps(chosen, spans)), *whole])
        self.pages_scanned += sum(vma.end - vma.start for vma in space.vmas) // PAGE
        self.pages_written += sum(end - start for start, end in space.ranges) // PAGE

    def copy(self, copier: Copier) -> None:
        """Copy the chosen pages, and the content of shared objects and files that nothing else keeps."""
        for _, space in sorted(self._spaces.items()):
            self._copy_space(space, copier)
        self._shared += self._copy_shared(copier)
        self.kinds.copy_files(copier, self._names)
        copier.flush()

    def _copy_space(self, space: _Space, copier: Copier) -> None:
        """Copy an address space. Pages that a forked process still shares with its parent, or that are equal, are in
        the image once."""
        origin = self._spaces.get(space.origin)
        common = list(_common(space, origin)) if origin else []
        with Mem(space.tid) as mem:
            space.runs = copier.copy_memory(mem, list(without(space.ranges, _covered(common))))
            if origin and common:
                before = copier.data.size
                with Mem(origin.tid) as theirs:
                    runs = copier.copy_changed(mem, theirs, common)
                written = (copier.data.size - before) // PAGE
                self.pages_written -= sum(run.pages for run in common) - written
                space.runs = sorted([*space.runs, *runs], key=attrgetter('start'))

    def _copy_shared(self, copier: Copier) -> Iterator[Record]:
        for record, runs in self.kinds.copy_shared(copier):
            self.pages_scanned += -(-record.size // PAGE)
            self.pages_written += sum(run.pages for run in runs)
            yield record
            yield from page_runs(OF_SHARED_MEMORY, record.shm_id, runs)

    def records(self) -> Iterator[Record]:
        """Yield all records of memory.img."""
        yield from self.kinds.records()
        yield from self._shared
        for space in self._spaces.values():
            yield space.mm
            yield from space.vmas
            yield from page_runs(OF_MM, space.mm_id, space.runs)
            for kind, found in zip(REGIONS, space.regions, strict=True):
                if found:
                    yield kind.record(space.mm_id, found)


def _common(space: _Space, origin: _Space) -> Iterator[PageRun]:
    """Yield the parts of the origin's runs where the other one may have equal pages: both have pages there, in private
    mappings of one kind and object."""
    mine, theirs = ([vma for vma in one.vmas if vma.flags & MAP_PRIVATE] for one in (space, origin))
    alike = []
    for both in overlaps(_spans(mine), _spans(theirs)):
        one, other = mine[both.first], theirs[both.second]
        if (one.kind, one.object) == (other.kind, other.object):
            alike.append((both.start, both.end))
    wanted = [(both.start, both.end) for both in overlaps(space.ranges, alike)]
    for both in overlaps(wanted, _covered(origin.runs)):
        run = origin.runs[both.second]
        yield part_of(run, (both.start - run.start) // PAGE, (both.end - both.start) // PAGE)


def _spans(vmas: Iterable[records.Vma]) -> list[Range]:
    return [(vma.start, vma.end) for vma in vmas]


def _covered(runs: Iterable[PageRun]) -> list[Range]:
    return [(run.start, run.start + run.pages * PAGE) for run in runs]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which memory a process has from the one that forks it, so that both share its pages as they did. Pure.

The maker is filled first. The child keeps those of its private mappings that lie in one of the maker's kind and have
pages that are in the image once for both; there it gives back what it has not, and reads what it has otherwise. All
else that it inherits it unmaps.

    maker's     |AAAAAAAAAAAAAAAA|      |BBBBBBBB|
    child's     |AAAAAAAAAA|            |CCCCCCCC|
                 kept       unmapped     unmapped, mapped

Compared are mappings as they are first made: what comes later (protections, advice, names, locks) must not be there
yet when the child is forked, for some advice keeps memory from it, madvise(2) MADV_DONTFORK.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE

from ckptd.dump.copy import part_of
from ckptd.image.reader import Memory, runs_between
from ckptd.image.records import ANON, PAGE, VDSO, VSYSCALL, VVAR, PageRun, Vma
from ckptd.kernel.memory import Range
from ckptd.kernel.mman import MAP_LOCKED
from ckptd.kernel.ranges import overlaps, without

_KERNELS_OWN = (VDSO, VVAR, VSYSCALL)


def ordinary(memory: Memory) -> list[Vma]:
    """Mappings that are not the kernel's own."""
    return [vma for vma in memory.vmas if vma.kind not in _KERNELS_OWN]


def is_filled(memory: Memory, vma: Vma) -> bool:
    """Whether pages come that the task itself may read into place."""
    flags = vma.vm_flags.split()
    return (bool(vma.flags & MAP_PRIVATE)
            and ('ac' in flags or 'nr' in flags or bool(vma.protection & PROT_WRITE) or vma.kind == ANON)
            and any(runs_between(memory.runs, vma.start, vma.end)))


def first_protection(memory: Memory, vma: Vma) -> int:
    """Writable where pages come, and where it once was: as committed memory it shows that ('ac'). Readable where it can
    only be run: for such memory the kernel takes a protection key (mm/mmap.c), which nobody shall inherit."""
    if (vma.flags & MAP_PRIVATE and 'ac' in vma.vm_flags.split()) or is_filled(memory, vma):
        return vma.protection | PROT_WRITE
    return vma.protection | (PROT_READ if vma.protection == PROT_EXEC else 0)


@dataclass(frozen=True)
class CowSharing:
    """What the address space `mine` has of `theirs`, that of its maker."""
    theirs: Memory
    mine: Memory

    @cached_property
    def kept(self) -> list[Range]:
        """Mappings of the child that are there when it is born."""
        candidates = list(self._alike())
        found = dict.fromkeys(both.first for both in overlaps(candidates, self._same_pages))
        return [candidates[index] for index in found]

    @cached_property
    def same(self) -> list[Range]:
        """Pages in them that are the same."""
        return [(both.start, both.end) for both in overlaps(self.kept, self._same_pages)]

    def dropped(self) -> Iterator[Range]:
        """Pages in them that the child has not, or has otherwise."""
        theirs = [(both.start, both.end) for both in overlaps(self.kept, spans(self.theirs.runs))]
        return without(theirs, self.same)

    def _alike(self) -> Iterator[Range]:
        mine, theirs = ordinary(self.mine), ordinary(self.theirs)
        for both in overlaps(_places(mine), _places(theirs)):
            vma, other = mine[both.first], theirs[both.second]
            if ((both.start, both.end) == (vma.start, vma.end) and is_filled(self.mine, vma)
                    and _first_state(self.mine, vma) == _first_state(self.theirs, other)):
                yield both.start, both.end

    @cached_property
    def _same_pages(self) -> list[Range]:
        """What both have at one address, and the image has once."""
        mine, theirs = self.mine.runs, self.theirs.runs
        return [(both.start, both.end) for both in overlaps(spans(mine), spans(theirs))
                if _source(mine[both.first]) == _source(theirs[both.second])]


def spans(runs: Iterable[PageRun]) -> list[Range]:
    return [(run.start, run.start + run.pages * PAGE) for run in runs]


def remaining(runs: Sequence[PageRun], taken: Sequence[Range]) -> Iterator[PageRun]:
    """Those parts of runs that are not taken."""
    every = spans(runs)
    for both in overlaps(every, list(without(every, taken))):
        run = runs[both.first]
        yield part_of(run, (both.start - run.start) // PAGE, (both.end - both.start) // PAGE)


def between(ranges: Iterable[Range], start: int, end: int) -> Iterator[Range]:
    """The gaps that these leave of [start, end)."""
    edges = [(start, start), *sorted(ranges), (end, end)]
    return ((one[1], other[0]) for one, other in pairwise(edges) if one[1] < other[0])


def _places(vmas: Iterable[Vma]) -> list[Range]:
    return [(vma.start, vma.end) for vma in vmas]


def _source(run: PageRun) -> tuple[int, int]:
    """Which part, and where in it what lies at address 0 would be."""
    return run.part, run.offset - run.start


def _first_state(memory: Memory, vma: Vma) -> tuple[int, int, int, int]:
    """What mmap(2) makes of a mapping, wherever it begins."""
    file_offset = 0 if vma.flags & MAP_ANONYMOUS else vma.offset - vma.start
    return first_protection(memory, vma), vma.flags & ~MAP_LOCKED, vma.object, file_offset

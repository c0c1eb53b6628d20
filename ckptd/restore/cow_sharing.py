# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that a process takes over from the one that forks it, so that both share its pages as before. Pure.

The maker is filled first. The child keeps each private mapping that lies in one of the maker's of the same type and has
pages that are in the image once for both. In the kept mappings it drops inherited pages that it lacks and reads the
ones that differ. It unmaps everything else that it inherits.

    maker's     |AAAAAAAAAAAAAAAA|      |BBBBBBBB|
    child's     |AAAAAAAAAA|            |CCCCCCCC|
                 kept       unmapped     unmapped, mapped

Mappings are compared in their first state. Later changes (protections, advice, names, locks) must not be made before
the child is forked, because some advice hides memory from it (madvise(2) MADV_DONTFORK).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE

from ckptd.dump.copy import part_of
from ckptd.image.reader import Memory, runs_between
from ckptd.image.records import PAGE, PageRun, Vma
from ckptd.kernel.memory import Range
from ckptd.kernel.mman import MAP_HUGETLB, MAP_LOCKED
from ckptd.kernel.ranges import overlaps, without
from ckptd.objects.mappings.registry import ANONYMOUS, KERNELS_OWN


def ordinary(memory: Memory) -> list[Vma]:
    """Return the mappings that are not the kernel's own."""
    return [vma for vma in memory.vmas if vma.kind not in KERNELS_OWN]


def is_filled(memory: Memory, vma: Vma) -> bool:
    """Whether the mapping gets pages that the task itself may read into place."""
    flags = vma.vm_flags.split()
    return (bool(vma.flags & MAP_PRIVATE)
            and ('ac' in flags or 'nr' in flags or bool(vma.protection & PROT_WRITE) or vma.kind in ANONYMOUS)
            and any(runs_between(memory.runs, vma.start, vma.end)))


def first_protection(memory: Memory, vma: Vma) -> int:
    """Return the first protection of a mapping. It is writable if pages will be read into it, or if it once was: that
    shows as committed memory ('ac'). It is readable if the final one is only executable: for such memory the kernel
    takes a protection key (mm/mmap.c), which must not be inherited."""
    if (vma.flags & MAP_PRIVATE and 'ac' in vma.vm_flags.split()) or is_filled(memory, vma):
        return vma.protection | PROT_WRITE
    return vma.protection | (PROT_READ if vma.protection == PROT_EXEC else 0)


@dataclass(frozen=True)
class CowSharing:
    """The memory that the address space `mine` takes over from `theirs`, that of its maker."""
    theirs: Memory
    mine: Memory

    @cached_property
    def kept(self) -> list[Range]:
        """Mappings of the child that exist when it is born."""
        candidates = list(self._alike())
        found = dict.fromkeys(both.first for both in overlaps(candidates, self._same_pages))
        return [candidates[index] for index in found]

    @cached_property
    def same(self) -> list[Range]:
        """Equal pages in the kept mappings."""
        return [(both.start, both.end) for both in overlaps(self.kept, self._same_pages)]

    def dropped(self) -> Iterator[Range]:
        """Yield pages in the kept mappings that the child lacks or that differ."""
        theirs = [(both.start, both.end) for both in overlaps(self.kept, spans(self.theirs.runs))]
        return without(theirs, self.same)

    def _alike(self) -> Iterator[Range]:
        mine, theirs = ordinary(self.mine), ordinary(self.theirs)
        for both in overlaps(_places(mine), _places(theirs)):
            vma, other = mine[both.first], theirs[both.second]
            # huge pages are taken from the pool for each process
            if ((both.start, both.end) == (vma.start, vma.end) and not vma.flags & MAP_HUGETLB
                    and is_filled(self.mine, vma)
                    and _first_state(self.mine, vma) == _first_state(self.theirs, other)):
                yield both.start, both.end

    @cached_property
    def _same_pages(self) -> list[Range]:
        """Pages that both have at one address and that are in the image once."""
        mine, theirs = self.mine.runs, self.theirs.runs
        return [(both.start, both.end) for both in overlaps(spans(mine), spans(theirs))
                if _source(mine[both.first]) == _source(theirs[both.second])]


def spans(runs: Iterable[PageRun]) -> list[Range]:
    return [(run.start, run.start + run.pages * PAGE) for run in runs]


def remaining(runs: Sequence[PageRun], taken: Sequence[Range]) -> Iterator[PageRun]:
    """Yield the parts of runs that are not taken."""
    every = spans(runs)
    for both in overlaps(every, list(without(every, taken))):
        run = runs[both.first]
        yield part_of(run, (both.start - run.start) // PAGE, (both.end - both.start) // PAGE)


def between(ranges: Iterable[Range], start: int, end: int) -> Iterator[Range]:
    """Yield the gaps that these ranges leave in [start, end)."""
    edges = [(start, start), *sorted(ranges), (end, end)]
    return ((one[1], other[0]) for one, other in pairwise(edges) if one[1] < other[0])


def _places(vmas: Iterable[Vma]) -> list[Range]:
    return [(vma.start, vma.end) for vma in vmas]


def _source(run: PageRun) -> tuple[int, int]:
    """Return the data part, and the offset in it that address 0 would have."""
    return run.part, run.offset - run.start


def _first_state(memory: Memory, vma: Vma) -> tuple[int, int, int, int]:
    """Return the state that mmap(2) gives a mapping, independent of its start."""
    file_offset = 0 if vma.flags & MAP_ANONYMOUS else vma.offset - vma.start
    return first_protection(memory, vma), vma.flags & ~MAP_LOCKED, vma.object, file_offset

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mappings whose addresses the kernel chooses: rings, whose mmap(2) takes no address and which mremap(2) cannot move.

The kernel takes the highest free range that is large enough, or the lowest (mmap(2); mm/mmap.c, unmapped_area_topdown).
So all free memory is reserved, without access, and the only free range is then the one where the mapping was.
"""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from mmap import MAP_ANONYMOUS, MAP_PRIVATE

from ckptd.image.records import Vma
from ckptd.kernel.arch.x86_64 import TASK_SIZE
from ckptd.kernel.maps import read_maps
from ckptd.kernel.memory import Range
from ckptd.kernel.mman import MAP_FIXED_NOREPLACE, MAP_NORESERVE
from ckptd.kernel.procfs import read_file
from ckptd.remote.script import Script

PROT_NONE = 0       # <sys/mman.h>
_RESERVED = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE


def place(tid: int, script: Script, vmas: Sequence[Vma], map_one: Callable[[Vma], None]) -> None:
    """Map each of `vmas` at its address, when everything else of the address space of task `tid` is mapped. map_one:
    adds the call that maps it to the script."""
    if not vmas:
        return
    lowest = int(read_file('/proc/sys/vm/mmap_min_addr'))
    own = [(vma.start, vma.end) for vma in vmas]
    used = sorted([(one.start, one.end) for one in read_maps(tid)] + own)
    free = [(max(start, lowest), min(end, TASK_SIZE))
            for (_, start), (end, _) in pairwise(chain([(0, 0)], used, [(TASK_SIZE, TASK_SIZE)]))]
    reserved = [one for one in free if one[0] < one[1]]
    for one in chain(reserved, own):
        _reserve(script, one)
    for vma in vmas:
        script.call('munmap', vma.start, vma.end - vma.start)
        map_one(vma)
    for start, end in reserved:
        script.call('munmap', start, end - start)


def _reserve(script: Script, free: Range) -> None:
    start, end = free
    script.call('mmap', start, end - start, PROT_NONE, _RESERVED, -1, 0, about='reserved memory', expect=start)

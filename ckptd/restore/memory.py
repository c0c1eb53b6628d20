# SPDX-License-Identifier: LGPL-2.1-or-later
"""An address space, made by one of its own tasks: mapped, and its pages read from the image directly into place.

    build      inherited memory: see cow_sharing.py for the part that stays; unmap the rest, drop pages that differ
               mmap(2) of everything else at its old address, writable where pages will be read
               preadv(2) by the task from the data part: one copy, by the kernel
    finish     when all processes are born: mappings that the kernel places, protection keys,
               protections, advice, names, locks, regions
    describe   the kernel's data about the layout

Pages that no page run names stay untouched: absent, zero, or as in the file.
"""

import ctypes
import errno
import struct
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE
from operator import attrgetter

from ckptd.image.reader import ImageReader, Memory, runs_between
from ckptd.image.records import PAGE, PageRun, Vma
from ckptd.kernel.arch.x86_64 import TASK_SIZE
from ckptd.kernel.decl import offset_of
from ckptd.kernel.memory import IOV_MAX, Mem, Range, prctl_mm_map
from ckptd.kernel.mman import (
    MADV_POPULATE_WRITE,
    MCL_FUTURE,
    MCL_ONFAULT,
    MLOCK_ONFAULT,
)
from ckptd.kernel.prctl import (
    PR_SET_MM,
    PR_SET_MM_MAP,
    PR_SET_VMA,
    PR_SET_VMA_ANON_NAME,
)
from ckptd.kernel.shmem import SHARED_ANONYMOUS
from ckptd.objects.mappings.base import MappedSpace, label
from ckptd.objects.mappings.registry import ANONYMOUS, KERNELS_OWN, PLACED, REGIONS, MappedObjects, seal_mappings
from ckptd.remote.interleave import Steps
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.restore.cow_sharing import (
    CowSharing,
    between,
    first_protection,
    is_filled,
    ordinary,
    remaining,
)
from ckptd.restore.placing import place

# MADV_*, by VmFlags
_ADVICE = {'rr': 1, 'sr': 2, 'dc': 10, 'mg': 12, 'hg': 14, 'nh': 15, 'dd': 16, 'wf': 18}
_READ_AT_ONCE = 32 << 20        # bytes between two checks for a Cancel
# Pages that are populated just before they are read into are still in the processor's cache then and cost no fault
# each, which saves a fifth of the time. Populating all at once would lose that.
_PIECE, _POPULATE_FROM = 2 << 20, 64 << 10


class Space:
    """An address space.

    origin: mm_id of the one that it inherits pages from; 0 for none. data: gives the fd of a data part, for preadv(2).
    locked: see Allowed.locked. on_bytes(n): n bytes of pages are in place.
    """

    def __init__(self, reader: ImageReader, mm_id: int, origin: int, objects: MappedObjects, data: Callable[[int], int],
                 locked: Collection[int], on_bytes: Callable[[int], None]) -> None:
        self.mm_id = mm_id
        self._memory: Memory = reader.memory(mm_id)
        self._reader, self._objects, self._data = reader, objects, data
        self._locked, self._on_bytes = locked, on_bytes
        self._ordinary = ordinary(self._memory)
        self._cow_sharing = CowSharing(reader.memory(origin), self._memory) if origin else None
        self.is_built = False

    def open(self) -> None:
        """Open everything that is mapped or read, before the task exists that inherits it."""
        for vma in self._ordinary:
            self._objects.kind_of(vma).open(vma, self._objects.means)
        for run in self._memory.runs:
            self._data(run.part)
        self._objects.executable(self._memory.mm)

    def build(self, stub: Stub) -> Steps[None]:
        """Make mappings and pages, by a task of this address space."""
        self.is_built = True
        script, space = Script(stub), self._space(stub)
        kept = self._cow_sharing.kept if self._cow_sharing else []
        if self._cow_sharing:
            clear(script, stub, kept)
            for start, end in self._cow_sharing.dropped():
                script.call('madvise', start, end - start, MADV_DONTNEED, about='inherited pages')
        there = set(kept)
        kernels_own = [vma for vma in self._memory.vmas if vma.kind in KERNELS_OWN]
        for vma in (*self._ordinary, *kernels_own):
            if (vma.start, vma.end) not in there and vma.kind not in PLACED:
                self._objects.kind_of(vma).map(vma, first_protection(self._memory, vma), script, space)
        size = yield from self._fill(script)
        yield from script.run()
        self._on_bytes(size)

    def finish(self, stub: Stub) -> Steps[None]:
        """Set everything but the layout. From here on no task of it may fork, because some advice hides memory from
        children."""
        script = Script(stub)
        self._place(script, stub)
        self._allocate_keys(script)
        for vma in self._ordinary:
            self._finish(script, vma)
        for region in REGIONS:
            region.restore(self._memory, script)
        seal_mappings(self._ordinary, script)
        yield from script.run()
        self._force(stub.tid)
        for vma in self._memory.vmas:
            self._objects.kind_of(vma).patch(vma, self._space(stub))

    def _place(self, script: Script, stub: Stub) -> None:
        """Make the mappings whose addresses the kernel chooses."""
        space = self._space(stub)

        def map_one(vma: Vma) -> None:
            self._objects.kind_of(vma).map(vma, vma.protection, script, space)
        place(stub.tid, script, [vma for vma in self._ordinary if vma.kind in PLACED], map_one)

    def _space(self, stub: Stub) -> MappedSpace:
        return MappedSpace(self._memory, stub, self._objects.means)

    def _allocate_keys(self, script: Script) -> None:
        """Allocate protection keys. pkey_alloc(2) returns the lowest free key, so allocate them all and free the
        gaps."""
        wanted = self._memory.mm.pkeys
        for key in range(1, wanted.bit_length()):
            script.call('pkey_alloc', 0, 0, about='protection keys', expect=key)
        for key in range(1, wanted.bit_length()):
            if not wanted >> key & 1:
                script.call('pkey_free', key)

    # ------------------------------------------------------------ fill

    def _runs(self, filled: bool) -> Iterator[PageRun]:
        """Yield runs inside ordinary mappings: those that the task reads into place (filled), or those that we write by
        force."""
        for vma in self._ordinary:
            if vma.flags & MAP_PRIVATE and is_filled(self._memory, vma) == filled:
                yield from runs_between(self._memory.runs, vma.start, vma.end)

    def _missing(self) -> Iterator[PageRun]:
        """Return the page runs that the task must read."""
        return remaining(list(self._runs(True)), self._cow_sharing.same if self._cow_sharing else [])

    def _fill(self, script: Script) -> Steps[int]:
        """Add the reads to the script. Return the bytes that its next run reads. A small address space is read in one
        run."""
        waiting = 0
        for part, offset, ranges in _reads(self._missing()):
            size = sum(end - start for start, end in ranges)
            for start, end in ranges:
                if end - start >= _POPULATE_FROM and self._is_anonymous(start):
                    script.call('madvise', start, end - start, MADV_POPULATE_WRITE, about='memory for pages')
            iov = b''.join(struct.pack('<QQ', start, end - start) for start, end in ranges)
            script.call('preadv', self._data(part), iov, len(ranges), offset, 0, about='pages', expect=size)
            waiting += size
            if waiting >= _READ_AT_ONCE:
                yield from script.run()
                self._on_bytes(waiting)
                waiting = 0
        return waiting

    def _is_anonymous(self, address: int) -> bool:
        return self._ordinary[bisect_right(self._ordinary, address, key=attrgetter('start')) - 1].kind in ANONYMOUS

    def _force(self, tid: int) -> None:
        """Write pages that the program itself could never write, such as a breakpoint in its text, as a debugger
        does."""
        with Mem(tid) as mem:
            for run in self._runs(False):
                for page in range(run.pages):
                    data = bytearray(PAGE)
                    self._reader.pread_into(memoryview(data), run.part, run.offset + page * PAGE)
                    mem.write(run.start + page * PAGE, bytes(data))

    # ------------------------------------------------------------ finish

    def _finish(self, script: Script, vma: Vma) -> None:
        kind, about, length = self._objects.kind_of(vma), label(vma), vma.end - vma.start
        # otherwise it is the kernel's own key for executable-only memory
        if vma.pkey and self._memory.mm.pkeys >> vma.pkey & 1:
            script.call('pkey_mprotect', vma.start, length, vma.protection, vma.pkey, about=about)
        elif kind.ignores_protection or first_protection(self._memory, vma) != vma.protection:
            script.call('mprotect', vma.start, length, vma.protection, about=about)
        for flag in vma.vm_flags.split():
            if flag in _ADVICE:
                script.call('madvise', vma.start, length, _ADVICE[flag], about=about)
        if vma.start in self._locked:
            # ENOMEM: it is locked, and some pages cannot be there: without access, or behind the end of a file. For
            # other memory it means that the limit is too low, and nothing is locked.
            lacks_pages = not vma.protection or not vma.flags & MAP_ANONYMOUS
            script.call('mlock2', vma.start, length, MLOCK_ONFAULT if vma.locked == 2 else 0, about=about,
                        accept=errno.ENOMEM if lacks_pages else 0)
        if kind.takes_name and vma.name and not vma.name.startswith('[') and vma.name not in SHARED_ANONYMOUS:
            name = vma.name.encode('utf-8', 'surrogateescape') + b'\0'
            # EBADF: the shared memory of an ordinary user is a memfd, which takes no name
            script.call('prctl', PR_SET_VMA, PR_SET_VMA_ANON_NAME, vma.start, length, name, about=about,
                        accept=errno.EBADF)

    def describe(self, script: Script) -> None:
        """Set the kernel's data about an address space. The program must be mapped by then, and the stub unmapped."""
        mm = self._memory.mm
        exe = self._objects.executable(mm)
        auxv = mm.auxv.ljust(8, b'\0')
        layout = prctl_mm_map(*mm.layout, 0, len(mm.auxv), exe)
        script.call_with_pointer('prctl', (PR_SET_MM, PR_SET_MM_MAP, ctypes.sizeof(layout), 0), 2, bytes(layout),
                                 (offset_of(prctl_mm_map, 'auxv'),), auxv, about='the layout of the address space')

    def lock(self, script: Script) -> None:
        """Set the rule for future mappings (mlockall(2))."""
        if future := self._memory.mm.lock_future:
            script.call('mlockall', MCL_FUTURE | (MCL_ONFAULT if future == 2 else 0))

    @property
    def memory(self) -> Memory:
        return self._memory

    @property
    def bytes_to_read(self) -> int:
        return sum(run.pages for run in self._missing()) * PAGE


def clear(script: Script, stub: Stub, kept: Sequence[Range] = ()) -> None:
    """Unmap everything that a task has inherited, except these ranges and the pages of its stub."""
    arena = stub.arena
    for start, end in between([*kept, (arena.start, arena.end)], 0, TASK_SIZE):
        script.call('munmap', start, end - start, about='inherited memory')


def _reads(runs: Iterator[PageRun]) -> Iterator[tuple[int, int, Sequence[tuple[int, int]]]]:
    """Yield (part, offset, ranges) of reads. A read takes many runs if they are contiguous in the image."""
    part = offset = size = 0
    ranges: list[tuple[int, int]] = []
    for run in runs:
        start, at, left = run.start, run.offset, run.pages * PAGE
        while left:
            if ranges and (run.part != part or at != offset + size or len(ranges) == IOV_MAX or size >= _PIECE):
                yield part, offset, ranges
                ranges, size = [], 0
            if not ranges:
                part, offset = run.part, at
            taken = min(left, _PIECE - size)
            ranges.append((start, start + taken))
            start, at, left, size = start + taken, at + taken, left - taken, size + taken
    if ranges:
        yield part, offset, ranges


def mapped_ranges(reader: ImageReader) -> list[tuple[int, int]]:
    """Return all mappings of all address spaces of an image at the addresses of programs."""
    return [(vma.start, vma.end) for vma in reader.every(Vma) if vma.start < TASK_SIZE]

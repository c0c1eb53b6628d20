# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory of huge pages: MAP_HUGETLB of mmap(2), MFD_HUGETLB of memfd_create(2), SHM_HUGETLB of shmget(2). The kernel
takes the pages of a pool of each size, which must have enough of them at a restart.

This kind is private memory; after a fork parent and child have pages of their own there, not shared ones. Shared
objects are of the same kinds as those with ordinary pages.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from mmap import MAP_ANONYMOUS, MAP_PRIVATE

from ckptd.errors import Finding
from ckptd.image.records import HUGE, PAGE, SHARED_MEMORY, SYSV, SharedMemory, Vma
from ckptd.kernel.hugetlb import free_pages, page_sizes, pool
from ckptd.kernel.maps import Mapping
from ckptd.kernel.memory import Range
from ckptd.kernel.mman import MAP_FIXED_NOREPLACE, MAP_HUGETLB, MAP_NORESERVE, huge_page_flags
from ckptd.kernel.shm import shmctl_stat
from ckptd.kernel.shmem import ANONYMOUS_HUGE, is_of_shm_mount
from ckptd.objects.attributes.base import about
from ckptd.objects.mappings.base import MappedSpace, MappingCheck, PrivateMemoryKind, label
from ckptd.objects.support import Support
from ckptd.remote.script import Script


class HugePagesMapping(PrivateMemoryKind, numbers=[HUGE]):
    """Memory of huge pages. The size of a page is in Vma.offset, in bytes: there is no file that it would be in."""
    support = Support('memory of huge pages (MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB)',
                      refused='a restart without enough free huge pages',
                      user='segments of huge pages are refused outside of the group vm.hugetlb_shm_group')

    def matches(self, mapping: Mapping) -> bool:
        return mapping.path == ANONYMOUS_HUGE and not mapping.shared and is_of_shm_mount(mapping)

    def offset_of(self, mapping: Mapping) -> int:
        return mapping.huge

    def restart_findings(self, context: MappingCheck) -> Iterator[Finding]:
        """Check the pools, for all kinds of memory with huge pages."""
        wanted: Counter[int] = Counter()
        users: dict[int, int] = {}
        for vma, size in _of_huge_pages(context):
            users.setdefault(size, context.mm_users[vma.mm_id])
            if vma.flags & MAP_PRIVATE and not vma.flags & MAP_NORESERVE:
                wanted[size] += -(-(vma.end - vma.start) // size)
        for record in context.reader.every(SharedMemory):
            if record.huge:
                users.setdefault(record.huge, 0)
                wanted[record.huge] += _pages_of(record, context)
        for size in users:
            if size not in page_sizes():
                yield about(users[size], 'memory', 'EINVAL', f'the tree has huge pages of {size >> 10} kB, and this '
                            'kernel has none of that size', 'boot a kernel that has (hugepagesz=)')
            elif (free := free_pages(size)) < wanted[size]:
                yield about(users[size], 'memory', 'ENOMEM', f'the tree needs {wanted[size]} huge pages of '
                            f'{size >> 10} kB, and {free} are free', f'raise nr_hugepages in {pool(size)}')

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | huge_page_flags(vma.offset) | MAP_FIXED_NOREPLACE
        script.call('mmap', vma.start, vma.end - vma.start, protection, flags | vma.flags & MAP_NORESERVE, -1, 0,
                    about=label(vma), expect=vma.start)


def _of_huge_pages(context: MappingCheck) -> Iterator[tuple[Vma, int]]:
    """Yield the mappings of huge pages, with the size of a page."""
    shared = {record.shm_id: record.huge for record in context.reader.every(SharedMemory)}
    for vma in context.reader.every(Vma):
        size = vma.offset if vma.kind == HUGE else shared.get(vma.object, 0) if vma.kind == SHARED_MEMORY else 0
        if size and vma.mm_id in context.mm_users:
            yield vma, size


def _pages_of(record: SharedMemory, context: MappingCheck) -> int:
    """Return the pages of an object that the kernel takes or reserves: those with content, and those that are
    mapped."""
    if record.kind == SYSV and _is_there(record.shmid):
        return 0        # it has its pages
    reserved = [(vma.offset, vma.offset + vma.end - vma.start) for vma, _ in _of_huge_pages(context)
                if vma.kind == SHARED_MEMORY and vma.object == record.shm_id
                and not vma.flags & (MAP_NORESERVE | MAP_PRIVATE)]
    filled = [(run.start, run.start + run.pages * PAGE) for run in context.reader.shared_runs(record.shm_id)]
    return _count(chain(reserved, filled), record.huge)


def _is_there(shmid: int) -> bool:
    with suppress(OSError):
        shmctl_stat(shmid)
        return True
    return False


def _count(ranges: Iterable[Range], page: int) -> int:
    """Return the number of pages that some range touches."""
    total = done = 0
    for start, end in sorted((start // page, -(-end // page)) for start, end in ranges):
        total += max(0, end - max(start, done))
        done = max(done, end)
    return total

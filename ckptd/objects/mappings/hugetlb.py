# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private memory of huge pages: MAP_HUGETLB of mmap(2). The kernel takes the pages of a pool of each size, which must
have enough of them at a restart. After a fork parent and child have pages of their own there, not shared ones."""

from collections import Counter
from collections.abc import Iterator
from mmap import MAP_ANONYMOUS, MAP_PRIVATE
from pathlib import Path

from ckptd.errors import Finding
from ckptd.image.records import HUGE, Vma
from ckptd.kernel.maps import Mapping
from ckptd.kernel.mman import MAP_FIXED_NOREPLACE, MAP_HUGETLB, MAP_NORESERVE, huge_page_flags
from ckptd.objects.attributes.base import about
from ckptd.objects.mappings.base import MappedSpace, MappingCheck, PrivateMemoryKind, label
from ckptd.objects.mappings.special import is_private_huge
from ckptd.objects.support import Support
from ckptd.remote.script import Script

_POOL = '/sys/kernel/mm/hugepages/hugepages-{}kB'


class HugePagesMapping(PrivateMemoryKind, numbers=[HUGE]):
    """Memory of huge pages. The size of a page is in Vma.offset, in bytes: there is no file that it would be in."""
    support = Support('private memory of huge pages (MAP_HUGETLB)', refused='a restart without enough free huge pages')
    is_inherited = False

    def matches(self, mapping: Mapping) -> bool:
        return is_private_huge(mapping)

    def restart_findings(self, context: MappingCheck) -> Iterator[Finding]:
        wanted: Counter[int] = Counter()
        users: dict[int, int] = {}
        for vma in context.reader.every(Vma):
            if vma.kind == HUGE and vma.mm_id in context.mm_users and vma.offset and not vma.flags & MAP_NORESERVE:
                wanted[vma.offset] += -(-(vma.end - vma.start) // vma.offset)
                users.setdefault(vma.offset, context.mm_users[vma.mm_id])
        for size, count in wanted.items():
            if (free := _free_pages(size)) < count:
                yield about(users[size], 'memory', 'ENOMEM', f'the tree needs {count} huge pages of {size >> 10} kB, '
                            f'and {free} are free', f'raise nr_hugepages in {_POOL.format(size >> 10)}')

    def map(self, vma: Vma, protection: int, script: Script, space: MappedSpace) -> None:
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | huge_page_flags(vma.offset) | MAP_FIXED_NOREPLACE
        script.call('mmap', vma.start, vma.end - vma.start, protection, flags | vma.flags & MAP_NORESERVE, -1, 0,
                    about=label(vma), expect=vma.start)


def _free_pages(size: int) -> int:
    """Return the pages of a pool that are neither used nor reserved; 0 if there is no such pool."""
    pool = Path(_POOL.format(size >> 10))
    try:
        return int((pool / 'free_hugepages').read_text()) - int((pool / 'resv_hugepages').read_text())
    except FileNotFoundError:
        return 0

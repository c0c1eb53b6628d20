# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guard regions: ranges of a mapping that are closed by madvise(MADV_GUARD_INSTALL), since 6.13."""

import mmap
from collections.abc import Iterator, Sequence

from ckptd.errors import Finding
from ckptd.image.reader import Memory
from ckptd.image.records import PAGE, GuardRegions
from ckptd.image.records import Range as Region
from ckptd.kernel.memory import PageMap, Range
from ckptd.kernel.mman import MADV_GUARD_INSTALL
from ckptd.objects.mappings.base import MappingCheck, RegionKind, lacking
from ckptd.objects.support import Support
from ckptd.remote.script import Script


class Guards(RegionKind):
    """The guard regions of an address space."""
    support = Support('guard regions')

    def scan(self, pagemap: PageMap, spans: Sequence[Range]) -> list[Range]:
        return pagemap.guards(spans)

    def record(self, mm_id: int, found: Sequence[Range]) -> GuardRegions:
        return GuardRegions(mm_id, tuple(Region(*one) for one in found))

    def lacks(self, context: MappingCheck) -> Iterator[Finding]:
        mm_id = next((one.mm_id for one in context.reader.every(GuardRegions) if one.ranges), 0)
        if mm_id and not _has_guard_regions():
            yield lacking(context.mm_users.get(mm_id, 0), 'guard regions (madvise MADV_GUARD_INSTALL)', '6.13')

    def restore(self, memory: Memory, script: Script) -> None:
        for one in memory.guards:
            script.call('madvise', one.start, one.end - one.start, MADV_GUARD_INSTALL, about='guard region')


def _has_guard_regions() -> bool:
    with mmap.mmap(-1, PAGE) as page:
        try:
            page.madvise(MADV_GUARD_INSTALL)
        except OSError:
            return False
    return True

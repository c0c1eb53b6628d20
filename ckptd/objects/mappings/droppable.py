# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that the kernel may drop at any time: MAP_DROPPABLE of <linux/mman.h>, since 6.11.

It is recorded as anonymous memory, and its MAP_* flags say that it is droppable. As MAP_DROPPABLE replaces
MAP_PRIVATE, it does not count as private, so its pages are not written into the image.
"""

import mmap
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import ANON, PAGE, Vma
from ckptd.kernel.maps import Mapping
from ckptd.kernel.mman import MAP_DROPPABLE
from ckptd.objects.mappings.base import MappingCheck, MappingKind, View, lacking
from ckptd.objects.support import Support

_DROPPABLE = 'dp'       # VmFlags of proc_pid_smaps(5)


class DroppableMapping(MappingKind):
    """Droppable memory. A restart maps it like any anonymous memory, with its own flags."""
    support = Support('droppable memory (MAP_DROPPABLE)')
    map_type = MAP_DROPPABLE

    def matches(self, mapping: Mapping) -> bool:
        return mapping.anonymous and _DROPPABLE in mapping.vm_flags

    def object_of(self, view: View) -> tuple[int, int]:
        return ANON, 0

    def lacks(self, context: MappingCheck) -> Iterator[Finding]:
        mm_id = next((one.mm_id for one in context.reader.every(Vma) if one.flags & MAP_DROPPABLE), 0)
        if mm_id and not _has_droppable_memory():
            yield lacking(context.mm_users.get(mm_id, 0), 'droppable memory (MAP_DROPPABLE)', '6.11')


def _has_droppable_memory() -> bool:
    try:
        mmap.mmap(-1, PAGE, flags=MAP_DROPPABLE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True

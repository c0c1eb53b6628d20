# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that the kernel may drop at any time: MAP_DROPPABLE of <linux/mman.h>, since 6.11.

It is recorded as anonymous memory, and its MAP_* flags say that it is droppable. As MAP_DROPPABLE replaces
MAP_PRIVATE, it does not count as private, so its pages are not written into the image.
"""

from ckptd.image.records import ANON
from ckptd.kernel.maps import Mapping
from ckptd.kernel.mman import MAP_DROPPABLE
from ckptd.objects.mappings.base import MappingKind, View

_DROPPABLE = 'dp'       # VmFlags of proc_pid_smaps(5)


class DroppableMapping(MappingKind):
    """Droppable memory."""
    map_type = MAP_DROPPABLE

    def matches(self, mapping: Mapping) -> bool:
        return mapping.anonymous and _DROPPABLE in mapping.vm_flags

    def object_of(self, view: View) -> tuple[int, int]:
        return ANON, 0

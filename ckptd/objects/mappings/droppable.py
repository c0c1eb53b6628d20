# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that the kernel may drop at any time: MAP_DROPPABLE of <linux/mman.h>, since 6.11.

It is recorded as anonymous memory. Only its MAP_* flags say that it is droppable.
"""

from ckptd.kernel.maps import Mapping
from ckptd.objects.mappings.base import MappingKind

_DROPPABLE = 'dp'       # VmFlags of proc_pid_smaps(5)


class DroppableMapping(MappingKind):
    """Memory whose pages are not written into the image."""

    def matches(self, mapping: Mapping) -> bool:
        return mapping.anonymous and _DROPPABLE in mapping.vm_flags

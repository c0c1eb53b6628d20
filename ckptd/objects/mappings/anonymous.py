# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private memory without a file: of mmap(2), the heap of brk(2), and stacks."""

from ckptd.image.records import ANON, HEAP, STACK
from ckptd.kernel.maps import Mapping
from ckptd.objects.mappings.base import PrivateMemoryKind
from ckptd.objects.support import Support

_GROWS_DOWN, _DROPPABLE = 'gd', 'dp'        # VmFlags of proc_pid_smaps(5)
_OTHERS = frozenset({_GROWS_DOWN, _DROPPABLE})


class AnonymousMapping(PrivateMemoryKind, numbers=[ANON]):
    """Ordinary memory."""
    support = Support('anonymous memory, heap and stacks')
    is_anonymous = True
    takes_name = True

    def matches(self, mapping: Mapping) -> bool:
        return mapping.anonymous and mapping.vm_flags.isdisjoint(_OTHERS)


class HeapMapping(PrivateMemoryKind, numbers=[HEAP], names=['[heap]']):
    """The heap."""
    support = AnonymousMapping.support
    takes_name = True


class StackMapping(PrivateMemoryKind, numbers=[STACK], names=['[stack]']):
    """The stack of the first thread, or other memory that grows downwards (MAP_GROWSDOWN)."""
    support = AnonymousMapping.support
    takes_name = True

    def matches(self, mapping: Mapping) -> bool:
        return mapping.anonymous and _GROWS_DOWN in mapping.vm_flags

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of a kind of memory mapping.

A kind is one class in one file of this package, found by registry.py. No other module names it. The hooks in life
order, none of which affects the task:

    matches(mapping)        is this mapping of my kind? At most one kind says yes
    finding(tid, mapping)   the reason why it cannot be dumped, or what will be lost
"""

from abc import ABC
from collections.abc import Collection
from typing import Any, ClassVar

from ckptd.errors import Finding
from ckptd.kernel.maps import Mapping

RELEASE = 'let the program release it before the checkpoint'     # a hint


class MappingKind(ABC):
    """One kind of mapping: `class AnonymousMapping(MappingKind, numbers=[ANON])`.

    The class is the rule, an instance is the state of one job. numbers: Vma.kind in images. names: as /proc/PID/maps
    shows them; a mapping of such a name is of this kind, and `matches` is not asked.
    """
    numbers: ClassVar[Collection[int]]
    names: ClassVar[Collection[str]]
    is_kernels: ClassVar[bool] = False      # the kernel makes it in every process (arch/x86/entry/vdso)

    def __init_subclass__(cls, *, numbers: Collection[int] = (), names: Collection[str] = (), **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.numbers, cls.names = numbers, names

    def matches(self, mapping: Mapping) -> bool:
        return False

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        return None

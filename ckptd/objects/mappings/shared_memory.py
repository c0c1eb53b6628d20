# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared memory without a name in the file system: the object behind a shared anonymous mapping, and its relatives."""

from collections.abc import Collection
from typing import Any, ClassVar

from ckptd.image.records import SHMEM
from ckptd.kernel.maps import Mapping
from ckptd.kernel.shmem import SHARED_ANONYMOUS, is_of_shm_mount
from ckptd.objects.mappings.base import MappingKind


class SharedMemoryKind(MappingKind):
    """A kind of shared object. object_kind: SharedMemory.kind in images. prefixes: of its paths in /proc."""
    object_kind: ClassVar[int]
    prefixes: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, object_kind: int, prefixes: Collection[str], **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.object_kind, cls.prefixes = object_kind, tuple(prefixes)

    def matches(self, mapping: Mapping) -> bool:
        # a file may have such a name, too
        return mapping.path.startswith(self.prefixes) and is_of_shm_mount(mapping)


class SharedAnonymousMapping(SharedMemoryKind, object_kind=SHMEM, prefixes=SHARED_ANONYMOUS):
    """Memory of mmap(2) with MAP_SHARED and MAP_ANONYMOUS."""

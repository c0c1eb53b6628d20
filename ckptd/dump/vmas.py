# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory mappings as records."""

from collections.abc import Set
from functools import lru_cache
from mmap import MAP_ANONYMOUS, MAP_SHARED

from ckptd.image import records
from ckptd.kernel.maps import Mapping
from ckptd.kernel.shmem import NAMED_ANONYMOUS
from ckptd.objects.mappings.base import MappingKind, View
from ckptd.objects.mappings.registry import MappingKinds

# MAP_* of <linux/mman.h>
_MAP_BY_VM_FLAG = {'gd': 0x100, 'lo': 0x2000, 'nr': 0x4000, 'ht': 0x40000, 'sf': 0x80000}
_ANON_PREFIX = '[anon:'


def vma_record(mm_id: int, tid: int, mapping: Mapping, kinds: MappingKinds) -> records.Vma:
    """Make the record of one mapping. Its file or shared object is noted in `kinds`."""
    kind = kinds.of(mapping)
    number, object_id = kind.object_of(View(tid, mapping))
    protection = mapping.read | mapping.write << 1 | mapping.execute << 2
    locked = 2 if 'lf' in mapping.vm_flags else int('lo' in mapping.vm_flags)
    return records.Vma(mm_id, mapping.start, mapping.end, protection, map_flags(kind, mapping), number,
                       kind.offset_of(mapping), object_id, locked, _text(mapping.vm_flags), _name(mapping),
                       mapping.pkey)


def map_flags(kind: MappingKind, mapping: Mapping) -> int:
    """Return MAP_* that map it again."""
    flags = MAP_SHARED if mapping.shared else kind.map_type
    if mapping.anonymous:
        flags |= MAP_ANONYMOUS
    return flags | _more_flags(mapping.vm_flags)


@lru_cache(maxsize=256)     # a process has thousands of mappings and a dozen sets of flags
def _more_flags(vm_flags: Set[str]) -> int:
    return sum(bit for code, bit in _MAP_BY_VM_FLAG.items() if code in vm_flags)


@lru_cache(maxsize=256)
def _text(vm_flags: Set[str]) -> str:
    return ' '.join(sorted(vm_flags))


def _name(mapping: Mapping) -> str:
    """Return the name that prctl(PR_SET_VMA) set, or the one in maps."""
    for prefix in (_ANON_PREFIX, NAMED_ANONYMOUS):
        if mapping.path.startswith(prefix):
            return mapping.path.removeprefix(prefix).removesuffix(']')
    return mapping.path

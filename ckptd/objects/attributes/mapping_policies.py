# SPDX-License-Identifier: LGPL-2.1-or-later
"""NUMA memory policies of single mappings (mbind(2)). Those of whole threads are in memory_policy.py.

/proc/PID/numa_maps does not tell them from the policy of the thread, and walks all page tables. So the process is
asked.
"""

import struct
from collections.abc import Generator, Iterable, Sequence

from ckptd.errors import Finding
from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.image.reader import ImageTask
from ckptd.kernel.maps import Mapping
from ckptd.kernel.mempolicy import MASK_BITS, MASK_SIZE, MPOL_DEFAULT, MPOL_F_ADDR, MPOL_MF_MOVE, are_nodes_gone
from ckptd.objects.attributes.base import Attribute, DumpedTask, RestartRights, RestoredTask, Scope, about
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results

_PER_BATCH = 100
_MODE = struct.Struct('<I4x')
_KERNELS_OWN = ('[vdso]', '[vvar]', '[vvar_vclock]', '[vsyscall]')


@layout
class MappingPolicy(Struct):
    """The policy of a range of addresses. mode, nodes: as in MemoryPolicy."""
    start: U64
    end: U64
    mode: U32
    nodes: bytes


@layout
class MappingPolicies(Struct):
    """All policies of an address space."""
    policies: tuple[MappingPolicy, ...]


class MappingPoliciesAttribute(Attribute[MappingPolicies, list[MappingPolicy]], name='mapping policies',
                               scope=Scope.MM):
    support = Support('NUMA policies of mappings (mbind)', warned='a policy whose nodes are not there')

    def ask_more(self, tid: int, mappings: Sequence[Mapping]) -> Generator[Batch, Results, list[MappingPolicy]]:
        """Ask for the modes of all mappings, then for the nodes of those that have a policy."""
        asked = [one for one in mappings if _may_have_policy(one)]
        modes = yield from _modes(asked)
        found = []
        with_policy = [(one, mode) for one, mode in zip(asked, modes, strict=True) if mode != MPOL_DEFAULT]
        for first in range(0, len(with_policy), _PER_BATCH):
            batch = Batch()
            rows = [(one, mode, batch.buffer(MASK_SIZE)) for one, mode in with_policy[first:first + _PER_BATCH]]
            for one, _, mask in rows:
                batch.call('get_mempolicy', 0, mask, MASK_BITS, one.start, MPOL_F_ADDR)
            results = yield batch
            found += [MappingPolicy(one.start, one.end, mode, results.data(mask).rstrip(b'\0'))
                      for one, mode, mask in rows]
        return found

    def dump(self, of: DumpedTask, answer: list[MappingPolicy]) -> MappingPolicies | None:
        return MappingPolicies(tuple(answer)) if answer else None

    def obstacles(self, record: MappingPolicies, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        if any(are_nodes_gone(one.nodes) for one in record.policies):
            yield about(task.vpid, 'memory policy', 'EINVAL', 'has mappings with memory of NUMA nodes that are not '
                        'there, or not ours', 'they take the memory that is nearest', 'warning')

    def restore(self, record: MappingPolicies, to: RestoredTask) -> None:
        for one in record.policies:
            if not are_nodes_gone(one.nodes):
                # the pages are there by now, and move to the nodes
                to.script.call('mbind', one.start, one.end - one.start, one.mode, one.nodes.ljust(MASK_SIZE, b'\0'),
                               MASK_BITS, MPOL_MF_MOVE, about=f'the memory policy of {one.start:x}-{one.end:x}')


def _modes(mappings: Sequence[Mapping]) -> Generator[Batch, Results, list[int]]:
    """Return MPOL_* with MPOL_F_* of each mapping; without CONFIG_NUMA all are MPOL_DEFAULT."""
    found = []
    for first in range(0, len(mappings), _PER_BATCH):
        batch = Batch()
        modes = [batch.buffer(_MODE.size) for _ in mappings[first:first + _PER_BATCH]]
        for mode, one in zip(modes, mappings[first:first + _PER_BATCH], strict=True):
            batch.call('get_mempolicy', mode, 0, 0, one.start, MPOL_F_ADDR)
        results = yield batch
        found += [_MODE.unpack(results.data(mode))[0] for mode in modes]
    return found


def _may_have_policy(mapping: Mapping) -> bool:
    """Whether the kernel takes memory for a mapping by its policy: not for text and other data of files that is only
    read."""
    return (mapping.anonymous or mapping.shared or mapping.write) and mapping.path not in _KERNELS_OWN

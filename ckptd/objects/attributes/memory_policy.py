# SPDX-License-Identifier: LGPL-2.1-or-later
"""The NUMA memory policy of a thread (set_mempolicy(2))."""

import struct
from collections.abc import Iterable

from ckptd.errors import Finding
from ckptd.image.grammar import U32, Struct, layout
from ckptd.image.reader import ImageTask
from ckptd.kernel.mempolicy import MASK_BITS, MASK_SIZE, MPOL_DEFAULT, are_nodes_gone
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader, RestartRights, RestoredTask, about
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results


@layout
class MemoryPolicy(Struct):
    """A policy. mode: MPOL_* with MPOL_F_*. nodes: mask, little-endian bytes without zeros at the end."""
    mode: U32
    nodes: bytes


class MemoryPolicyAttribute(Attribute[MemoryPolicy, tuple[int, bytes]], name='memory policy'):
    support = Support('NUMA policy of a thread', warned='a policy whose nodes are not there')

    def ask(self, batch: Batch) -> Reader[tuple[int, bytes]]:
        mode, mask = batch.buffer(8), batch.buffer(MASK_SIZE)
        batch.call('get_mempolicy', mode, mask, MASK_BITS, 0, 0)        # a kernel without CONFIG_NUMA leaves zeros

        def read(results: Results) -> tuple[int, bytes]:
            return struct.unpack_from('<I', results.data(mode))[0], results.data(mask).rstrip(b'\0')
        return read

    def dump(self, of: DumpedTask, answer: tuple[int, bytes]) -> MemoryPolicy | None:
        return MemoryPolicy(*answer) if answer[0] != MPOL_DEFAULT else None

    def obstacles(self, record: MemoryPolicy, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        if are_nodes_gone(record.nodes):
            yield about(task.vpid, 'memory policy', 'EINVAL', 'takes memory of NUMA nodes that are not there, or not '
                        'ours', 'it takes the memory that is nearest', 'warning')

    def restore(self, record: MemoryPolicy, to: RestoredTask) -> None:
        if not are_nodes_gone(record.nodes):
            to.script.call('set_mempolicy', record.mode, record.nodes.ljust(MASK_SIZE, b'\0'), MASK_BITS,
                           about='the memory policy')

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registrations of membarrier(2). Kernels before 6.3 do not report them."""

from ckptd.image.grammar import U32, Struct, layout
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader, RestoredTask, Scope
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch

MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9       # <linux/membarrier.h>


@layout
class Registrations(Struct):
    """The registrations. commands: MEMBARRIER_CMD_REGISTER_*, each to be called once."""
    commands: U32


class Membarrier(Attribute[Registrations, int], name='membarrier', scope=Scope.MM):
    support = Support('registrations of membarrier(2)')

    def ask(self, batch: Batch) -> Reader[int]:
        call = batch.call('membarrier', MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0)
        return lambda results: results.or_else(call, 0)

    def dump(self, of: DumpedTask, answer: int) -> Registrations | None:
        return Registrations(answer) if answer else None

    def restore(self, record: Registrations, to: RestoredTask) -> None:
        for bit in range(record.commands.bit_length()):
            if record.commands >> bit & 1:
                to.script.call('membarrier', 1 << bit, 0, 0, about='membarrier registrations')

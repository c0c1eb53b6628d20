# SPDX-License-Identifier: LGPL-2.1-or-later
"""A local descriptor table (modify_ldt(2)), as used by Wine and DOS emulators. It is refused."""

from ckptd.errors import NotSupported
from ckptd.image.grammar import Struct
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader, Scope
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch
from ckptd.tree import Task

_READ, _ENTRY = 0, 8        # function of modify_ldt(2); sizeof(struct desc_struct), <asm/desc_defs.h>


class Ldt(Attribute[Struct, int], name='LDT', scope=Scope.MM):
    support = Support('local descriptor table', dumped='no', restored='no', refused='all')

    def ask(self, batch: Batch) -> Reader[int]:
        call = batch.call('modify_ldt', _READ, batch.buffer(_ENTRY), _ENTRY)
        return lambda results: results.or_else(call, 0)      # a kernel without CONFIG_MODIFY_LDT_SYSCALL has none

    def require(self, task: Task, answer: int) -> None:
        """Refuse a table. Like read(2), the call returns a number of bytes if there is one."""
        if answer:
            raise NotSupported(f'{task.comm}[{task.tid}] has a local descriptor table (modify_ldt)', task=task.tid,
                               resource='LDT', phase='state',
                               hint='a program that makes segments of its own cannot be checkpointed yet')

    def dump(self, of: DumpedTask, answer: int) -> None:
        return None

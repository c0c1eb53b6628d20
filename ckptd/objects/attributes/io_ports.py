# SPDX-License-Identifier: LGPL-2.1-or-later
"""Permissions of a thread to use I/O ports (ioperm(2)). They are refused. Those of iopl(2) are not visible: the kernel
emulates it since Linux 5.5 and shows it nowhere."""

from ckptd.errors import NotSupported
from ckptd.image.grammar import Struct
from ckptd.kernel.io_ports import has_io_bitmap
from ckptd.kernel.ptrace import Tracee
from ckptd.objects.attributes.base import Attribute, DumpedTask
from ckptd.objects.support import Support
from ckptd.tree import Task


class IoPorts(Attribute[Struct, bool], name='I/O ports'):
    support = Support('permissions of I/O ports (ioperm)', dumped='no', restored='no', refused='all')

    def look(self, tracee: Tracee) -> bool:
        return has_io_bitmap(tracee.tid)

    def require(self, task: Task, answer: bool) -> None:
        if answer:
            raise NotSupported(f'{task.comm}[{task.tid}] may use I/O ports (ioperm)', task=task.tid,
                               resource='I/O ports', phase='state',
                               hint='a program that drives hardware by ports cannot be checkpointed')

    def dump(self, of: DumpedTask, answer: bool) -> None:
        return None

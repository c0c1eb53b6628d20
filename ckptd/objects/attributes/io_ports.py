# SPDX-License-Identifier: LGPL-2.1-or-later
"""Permissions of a thread to use I/O ports (ioperm(2)). They are refused. Those of iopl(2) are not visible: the kernel
emulates it since Linux 5.5 and shows it nowhere."""

from ckptd.errors import NotSupported
from ckptd.image.grammar import Struct
from ckptd.kernel.io_ports import has_io_bitmap
from ckptd.objects.attributes.base import Attribute, DumpedTask


class IoPorts(Attribute[Struct, None], name='I/O ports'):

    def dump(self, of: DumpedTask, answer: None) -> None:
        if has_io_bitmap(of.tid):
            raise NotSupported(f'{of.task.comm}[{of.tid}] may use I/O ports (ioperm)', task=of.tid,
                               resource='I/O ports', phase='state',
                               hint='a program that drives hardware by ports cannot be checkpointed')

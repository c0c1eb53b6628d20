# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kinds of memory in a core dump of a process (coredump_filter, core(5)). It is set from outside."""

from ckptd.image.grammar import U32, Struct, layout
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.task import read_coredump_filter
from ckptd.objects.attributes.base import Attribute, DumpedTask, RestoredTask, Scope
from ckptd.objects.support import Support


@layout
class CoredumpFilter(Struct):
    mask: U32


class CoredumpFilterAttribute(Attribute[CoredumpFilter, int], name='coredump_filter', scope=Scope.MM):
    """An attribute that is always kept, because its default is a parameter of the kernel."""
    support = Support('coredump_filter')

    def look(self, tracee: Tracee) -> int:
        return read_coredump_filter(tracee.tid)

    def dump(self, of: DumpedTask, answer: int) -> CoredumpFilter:
        return CoredumpFilter(answer)

    def restore(self, record: CoredumpFilter, to: RestoredTask) -> None:
        with open(f'/proc/{to.tid}/coredump_filter', 'rb+', buffering=0) as file:  # noqa: PTH123
            if int(file.read(16), 16) != record.mask:
                file.write(f'{record.mask:#x}'.encode())

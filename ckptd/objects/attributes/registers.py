# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registers of a thread, general and extended (XSAVE), and its mask of blocked signals. The tracer reads and sets them.
They are set last, when the task has left its stub."""

from ckptd.image import records
from ckptd.image.records import ThreadSignals
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.ptrace import Tracee
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, Stage
from ckptd.objects.support import Support


class RegistersAttribute(Attribute[records.Registers, tuple[bytes, bytes]], name='registers', stage=Stage.FILTERS):
    support = Support('registers, with all XSAVE components',
                      refused='32-bit code; Syscall User Dispatch; components that the processor of the restart lacks')

    def look(self, tracee: Tracee) -> tuple[bytes, bytes]:
        return bytes(tracee.regs), tracee.xstate()

    def dump(self, of: DumpedTask, answer: tuple[bytes, bytes]) -> records.Registers:
        return records.Registers(of.task.vtid, arch.EM, *answer)

    def finish(self, record: records.Registers, tracee: Tracee) -> None:
        tracee.set_xstate(record.xstate)
        tracee.regs = arch.user_regs_struct.from_buffer_copy(record.gpr)


class SignalMask(Attribute[ThreadSignals, int], name='signal mask', stage=Stage.FILTERS):
    support = Support('blocked signals')

    def look(self, tracee: Tracee) -> int:
        return tracee.sigmask

    def dump(self, of: DumpedTask, answer: int) -> Fields:
        return {'mask': answer}

    def finish(self, record: ThreadSignals, tracee: Tracee) -> None:
        tracee.sigmask = record.mask

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restartable sequences of a thread (rseq(2)). Memory of the program decides where an interrupted sequence continues,
so they are registered after the shed."""

from ckptd.image.records import ThreadPointers
from ckptd.kernel.ptrace import Tracee, ptrace_rseq_configuration
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Stage
from ckptd.objects.support import Support


class Rseq(Attribute[ThreadPointers, ptrace_rseq_configuration], name='rseq', stage=Stage.AFTER_RIGHTS):
    support = Support('restartable sequences')

    def look(self, tracee: Tracee) -> ptrace_rseq_configuration:
        return tracee.rseq()

    def dump(self, of: DumpedTask, answer: ptrace_rseq_configuration) -> Fields:
        return {'rseq': answer.rseq_abi_pointer, 'rseq_len': answer.rseq_abi_size, 'rseq_signature': answer.signature,
                'rseq_flags': answer.flags}

    def restore(self, record: ThreadPointers, to: RestoredTask) -> None:
        if record.rseq:
            to.script.call('rseq', record.rseq, record.rseq_len, record.rseq_flags, record.rseq_signature,
                           about='rseq')

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restartable sequences of a thread (rseq(2)). Memory of the program decides where an interrupted sequence continues,
so they are registered after the shed."""

from ckptd.image.records import ThreadPointers
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Stage


class Rseq(Attribute[ThreadPointers, None], name='rseq', stage=Stage.AFTER_RIGHTS):

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        rseq = of.tracee.rseq()
        return {'rseq': rseq.rseq_abi_pointer, 'rseq_len': rseq.rseq_abi_size, 'rseq_signature': rseq.signature,
                'rseq_flags': rseq.flags}

    def restore(self, record: ThreadPointers, to: RestoredTask) -> None:
        if record.rseq:
            to.script.call('rseq', record.rseq, record.rseq_len, record.rseq_flags, record.rseq_signature,
                           about='rseq')

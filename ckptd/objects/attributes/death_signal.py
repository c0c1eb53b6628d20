# SPDX-License-Identifier: LGPL-2.1-or-later
"""The signal that a process gets when its parent ends (PR_SET_PDEATHSIG(2const)). A change of ids clears it
(kernel/cred.c, commit_creds), so it is set after the shed."""

from ckptd.image.records import ThreadPointers
from ckptd.kernel.prctl import PR_GET_PDEATHSIG, PR_SET_PDEATHSIG
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, Reader, RestoredTask, Stage
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch


class DeathSignal(Attribute[ThreadPointers, int], name='death signal', stage=Stage.AFTER_RIGHTS):
    support = Support('signal at the end of the parent (PR_SET_PDEATHSIG)')

    def ask(self, batch: Batch) -> Reader[int]:
        out = batch.buffer(8)
        batch.call('prctl', PR_GET_PDEATHSIG, out)
        return lambda results: int.from_bytes(results.data(out), 'little')

    def dump(self, of: DumpedTask, answer: int) -> Fields:
        return {'pdeath_signal': answer}

    def restore(self, record: ThreadPointers, to: RestoredTask) -> None:
        if record.pdeath_signal:
            to.script.call('prctl', PR_SET_PDEATHSIG, record.pdeath_signal, 0, 0, 0)

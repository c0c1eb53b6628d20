# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals that are queued to a process or to a thread, with all that they carry. The task sends them to itself, after
the shed: they lead to its handlers."""

from ckptd.image.records import ProcessState, ThreadSignals
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope, Stage


class ProcessQueue(Attribute[ProcessState, None], name='signals of the process', scope=Scope.PROCESS,
                   stage=Stage.AFTER_RIGHTS):

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        return {'shared_pending': of.process.pending}

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        for info in record.shared_pending:
            to.script.call('rt_sigqueueinfo', record.vpid, info[0], info, about=f'pending signal {info[0]}')


class ThreadQueue(Attribute[ThreadSignals, None], name='signals of the thread', stage=Stage.AFTER_RIGHTS):

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        return {'pending': of.pending}

    def restore(self, record: ThreadSignals, to: RestoredTask) -> None:
        for info in record.pending:
            to.script.call('rt_tgsigqueueinfo', to.task.vtgid, record.vpid, info[0], info,
                           about=f'pending signal {info[0]}')

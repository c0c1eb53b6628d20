# SPDX-License-Identifier: LGPL-2.1-or-later
"""Signals that are queued to a process or a thread, with all their data. The task sends them to itself after the shed,
because they lead to its handlers. A SIGTRAP is sent last, since a stub that did not block it would receive it."""

import signal
from collections.abc import Iterator, Sequence

from ckptd.image.records import ProcessState, ThreadSignals
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope, Stage
from ckptd.objects.support import Support
from ckptd.remote.script import Script


class ProcessQueue(Attribute[ProcessState, None], name='signals of the process', scope=Scope.PROCESS,
                   stage=Stage.AFTER_RIGHTS):
    support = Support('pending signals, with their data')

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        return {'shared_pending': of.process.pending}

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        _to_process(record, _others(record.shared_pending), to.script)


class ProcessTraps(Attribute[ProcessState, None], name='SIGTRAP of the process', scope=Scope.PROCESS,
                   stage=Stage.FILTERS):
    support = ProcessQueue.support

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        _to_process(record, _traps(record.shared_pending), to.script)


class ThreadQueue(Attribute[ThreadSignals, None], name='signals of the thread', stage=Stage.AFTER_RIGHTS):
    support = ProcessQueue.support

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        return {'pending': of.pending}

    def restore(self, record: ThreadSignals, to: RestoredTask) -> None:
        _to_thread(to, _others(record.pending))


class ThreadTraps(Attribute[ThreadSignals, None], name='SIGTRAP of the thread', stage=Stage.FILTERS):
    support = ProcessQueue.support

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None

    def restore(self, record: ThreadSignals, to: RestoredTask) -> None:
        _to_thread(to, _traps(record.pending))


def _to_process(record: ProcessState, queued: Iterator[bytes], script: Script) -> None:
    for info in queued:
        script.call('rt_sigqueueinfo', record.vpid, info[0], info, about=f'pending signal {info[0]}')


def _to_thread(to: RestoredTask, queued: Iterator[bytes]) -> None:
    for info in queued:
        to.script.call('rt_tgsigqueueinfo', to.task.vtgid, to.vpid, info[0], info, about=f'pending signal {info[0]}')


def _others(queued: Sequence[bytes]) -> Iterator[bytes]:
    return (info for info in queued if info[0] != signal.SIGTRAP)


def _traps(queued: Sequence[bytes]) -> Iterator[bytes]:
    return (info for info in queued if info[0] == signal.SIGTRAP)

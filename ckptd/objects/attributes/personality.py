# SPDX-License-Identifier: LGPL-2.1-or-later
"""The execution domain of a process (personality(2))."""

from ckptd.image.records import ProcessState
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.task import read_personality
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope
from ckptd.objects.support import Support


class Personality(Attribute[ProcessState, int], name='personality', scope=Scope.PROCESS):
    support = Support('execution domain (personality)')

    def look(self, tracee: Tracee) -> int:
        return read_personality(tracee.tid)

    def dump(self, of: DumpedTask, answer: int) -> Fields:
        return {'personality': answer}

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        to.script.call('personality', record.personality)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The execution domain of a process (personality(2))."""

from ckptd.image.records import ProcessState
from ckptd.kernel.task import read_personality
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, RestoredTask, Scope


class Personality(Attribute[ProcessState, None], name='personality', scope=Scope.PROCESS):

    def dump(self, of: DumpedTask, answer: None) -> Fields:
        return {'personality': read_personality(of.tid)}

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        to.script.call('personality', record.personality)

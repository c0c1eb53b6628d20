# SPDX-License-Identifier: LGPL-2.1-or-later
"""The name of a thread (PR_SET_NAME(2const)): comm of /proc/PID. The scan reads it, and its record is TaskRecord."""

from ckptd.image.records import TaskRecord
from ckptd.kernel.prctl import PR_SET_NAME
from ckptd.objects.attributes.base import Attribute, DumpedTask, RestoredTask
from ckptd.objects.support import Support

_LONGEST = 15       # TASK_COMM_LEN, <linux/sched.h>


class Name(Attribute[TaskRecord, None], name='name'):
    support = Support('name of a thread')

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None

    def restore(self, record: TaskRecord, to: RestoredTask) -> None:
        name = record.comm.encode('utf-8', 'surrogateescape')[:_LONGEST] + b'\0'
        to.script.call('prctl', PR_SET_NAME, name)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cookies of core scheduling (PR_SCHED_CORE): only tasks with one cookie share a core. They are not restored, since the
kernel makes a new value for each, and shares it by processes that may be outside of the tree."""

from ckptd.errors import Finding
from ckptd.image.grammar import Struct
from ckptd.kernel.prctl import core_cookie
from ckptd.kernel.status import Status
from ckptd.objects.attributes.base import Attribute, DumpedTask
from ckptd.objects.support import Support
from ckptd.tree import Task


class CoreScheduling(Attribute[Struct, None], name='core scheduling'):
    support = Support('cookies of core scheduling', dumped='no', restored='no', warned='all')

    def findings(self, task: Task, status: Status) -> list[Finding]:
        if not core_cookie(task.tid):
            return []
        return [Finding(task.tid, task.comm, 'core scheduling', 'EOPNOTSUPP',
                        'has a cookie of core scheduling, and comes back without one',
                        'give the restored tree one (coresched), or restore it where its parent has one', 'warning')]

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None

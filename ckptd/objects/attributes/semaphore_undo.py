# SPDX-License-Identifier: LGPL-2.1-or-later
"""Adjustments of System V semaphores that a process undoes when it ends (SEM_UNDO, semop(2)). No interface shows them,
so they are lost. kcmp(2) tells whether there are any."""

import os

from ckptd.errors import Finding
from ckptd.image.grammar import Struct
from ckptd.kernel.kcmp import EQUAL, KCMP_SYSVSEM, kcmp
from ckptd.kernel.status import Status
from ckptd.objects.attributes.base import Attribute, DumpedTask
from ckptd.tree import Task


class SemaphoreUndo(Attribute[Struct, None], name='SEM_UNDO'):

    def findings(self, task: Task, status: Status) -> list[Finding]:
        # the list of a thread is that of its process unless it has made another one (CLONE_SYSVSEM, unshare(2))
        if not task.is_leader or not _has_list(task.tid):
            return []
        return [Finding(task.tid, task.comm, 'SEM_UNDO', 'EOPNOTSUPP', 'has used semaphores with SEM_UNDO',
                        'what it would undo at its end is lost in a restart', 'warning')]

    def dump(self, of: DumpedTask, answer: None) -> None:
        return None


def _has_list(tid: int) -> bool:
    """Whether the list differs from our own, which is empty."""
    try:
        return kcmp(tid, os.getpid(), KCMP_SYSVSEM) != EQUAL
    except OSError:     # no right to look, which another check reports; or it has ended
        return False

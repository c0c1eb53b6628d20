# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attributes of the tasks of a restart, stage by stage. objects/attributes has a file for each."""

from collections.abc import Callable, Mapping

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.objects.attributes.allowed import Allowed
from ckptd.objects.attributes.base import Owners, RestoredTask, RestoreMeans, Scope, Stage
from ckptd.objects.attributes.registry import Kept
from ckptd.remote.interleave import Steps, finish
from ckptd.remote.script import Script
from ckptd.restore.create import TaskBuilder
from ckptd.restore.plan import Plan, is_users_worker

_SHARED = {Scope.MM: 'mm_id', Scope.SIGHAND: 'sighand_id', Scope.FS: 'fs_id'}


def owners_of(plan: Plan) -> Mapping[int, Owners]:
    """Return the owners of the attributes that each living task sets, by vpid: itself, its process if it is the first
    thread, and shared objects that it is the first to use."""
    found = {task.vpid: {Scope.THREAD: task.vpid} for task in plan.alive}
    for process in plan.processes:
        if process.alive:
            found[process.alive[0].vpid][Scope.PROCESS] = process.vpid
    for scope, name in _SHARED.items():
        for number, vpid in plan.users(name).items():
            found[vpid][scope] = number
    return found


class TaskAttributes:
    """A setter of attributes. directory, terminal: see RestoreMeans."""

    def __init__(self, reader: ImageReader, plan: Plan, builder: TaskBuilder, allowed: Allowed,
                 directory: Callable[[str], int], terminal: Callable[[int], int],
                 warn: Callable[[Finding], None]) -> None:
        self._kept, self._builder = Kept(reader), builder
        self._owners = owners_of(plan)
        self._processes = {process.vpid: process for process in plan.processes}
        self._means = RestoreMeans(reader, allowed, directory, terminal, sets_ids=not plan.namespaces.user,
                                   is_users_worker=is_users_worker(plan), warn=warn)
        self._leaders = {process.vpid: process.leader for process in plan.processes}

    def set(self, stage: Stage, task: ImageTask, script: Script) -> Steps[None]:
        """Collect the calls of a task at a stage in the script, and make our own calls from outside. A dead task has
        only credentials."""
        return self._set(stage, task, script, self._owners.get(task.vpid, {Scope.THREAD: task.vpid}))

    def born(self, vpid: int) -> None:
        """Set the attributes that a process has from its birth on. Do nothing for a process outside of the tree."""
        self._early(Stage.BORN, vpid)

    def begins_session(self, vpid: int) -> None:
        """Set the attributes of a new session, which the children of its leader inherit. A dead leader has no terminal,
        and the image has no state of a dead process."""
        if vpid in self._processes and self._processes[vpid].alive:
            self._early(Stage.SESSION, vpid)

    def _early(self, stage: Stage, vpid: int) -> None:
        if leader := self._leaders.get(vpid):
            script = Script(self._builder[vpid])
            finish(self._set(stage, leader, script, {Scope.PROCESS: vpid}))
            script.do()

    def _set(self, stage: Stage, task: ImageTask, script: Script, owners: Owners) -> Steps[None]:
        process = self._processes[task.vtgid]
        return self._kept.restore(stage, owners, RestoredTask(task, self._builder[task.vpid], script, self._means,
                                                              process.pgid, process.sid))

    def finish(self, task: ImageTask) -> None:
        """Set the state that the tracer sets after a task has left its stub: registers, signal mask."""
        self._kept.finish(task.vpid, self._builder[task.vpid].tracee)

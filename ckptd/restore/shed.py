# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shed: all tasks of a tree take their own credentials and give up every right of the restart.

It comes after everything that needs a right (set_tid, PR_SET_MM_MAP, map_files) and after the inherited service fds are
closed. It comes before everything by which memory of the user can steer a task (rseq, signal handlers, timers).

Tasks that share an address space shed together. The first one makes it non-dumpable, the last one undoes that. Without
this the first task to become the user's would expose the code of the others through its /proc/TID/mem
(kernel/ptrace.c, __ptrace_may_access).

    restart by          how
    root                each task sets its credentials (Stage.RIGHTS), which ends with the capabilities of the image
    a user's worker     its tasks have CAP_CHECKPOINT_RESTORE and nothing else; every set is cleared. Memory that is not
                        dumpable is closed to its tracer as well, so what is to be run is written before, and /proc
                        tells whether it was done
    a user namespace    each task sets its credentials; its rights end with the namespace, whose owner the user is, so
                        there is nothing to hide. Its memory stays open to the tracer, who has no right to more
"""

import struct
from collections.abc import Mapping, Sequence

from ckptd.errors import CkptError
from ckptd.image import records
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.kernel.creds import (
    LINUX_CAPABILITY_VERSION_3,
    SUID_DUMP_DISABLE,
    SUID_DUMP_ROOT,
    SUID_DUMP_USER,
)
from ckptd.kernel.prctl import (
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_SET_DUMPABLE,
)
from ckptd.kernel.status import read_status
from ckptd.objects.attributes.base import Stage
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import Steps, finish, interleave
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.restore.attributes import TaskAttributes
from ckptd.restore.create import TaskBuilder
from ckptd.restore.memory import Space
from ckptd.restore.plan import Plan, is_users_worker


class Shed:
    """The shed of a restart. spaces: by mm_id; their memory locks are set while there is a right to do so."""

    def __init__(self, reader: ImageReader, plan: Plan, builder: TaskBuilder, attributes: TaskAttributes,
                 spaces: Mapping[int, Space]) -> None:
        self._reader, self._plan, self._builder, self._spaces = reader, plan, builder, spaces
        self._attributes = attributes
        self._ids = not plan.namespaces.user
        self._mms = plan.users('mm_id')

    def run(self) -> None:
        """Run the shed. CkptError if a task keeps a right, or cannot have its own."""
        groups = self._groups()
        if is_users_worker(self._plan):
            interleave(self._clear(group) for group in groups)
            if self._builder.init:      # it is not a task of the tree, and continues
                finish(_clear_capabilities([self._builder.init]))
                require_no_capability(self._builder.init.tid)
        else:
            interleave(self._take_own(group) for group in groups)

    def _groups(self) -> list[list[ImageTask]]:
        """Return all tasks, including the dead ones, by address space."""
        groups: dict[int, list[ImageTask]] = {}
        for task in self._plan.tasks:
            groups.setdefault(id(self._builder[task.vpid].turn), []).append(task)
        return list(groups.values())

    # ------------------------------------------------------------ root, or root of a user namespace

    def _take_own(self, group: Sequence[ImageTask]) -> Steps[None]:
        for task in group:
            script = Script(self._builder[task.vpid])
            if task is group[0] and self._ids:
                script.call('prctl', PR_SET_DUMPABLE, SUID_DUMP_DISABLE, 0, 0, 0)
            self._lock(task, script)
            yield from self._attributes.set(Stage.RIGHTS, task, script)
            if task is group[-1] and self._ids:
                self._set_dumpable(group, script)
            yield from script.run()

    def _set_dumpable(self, group: Sequence[ImageTask], script: Script) -> None:
        wanted = dumpable_of(self._reader, group)
        # SUID_DUMP_ROOT cannot be set; it comes only from a change of ids and the sysctl fs.suid_dumpable
        if wanted < SUID_DUMP_ROOT:
            script.call('prctl', PR_SET_DUMPABLE, wanted, 0, 0, 0)

    def _lock(self, task: ImageTask, script: Script) -> None:
        mm_id = task.record.mm_id
        if mm_id and self._mms.get(mm_id) == task.vpid:
            self._spaces[mm_id].lock(script)

    # ------------------------------------------------------------ a user's worker

    def _clear(self, group: Sequence[ImageTask]) -> Steps[None]:
        stubs = [self._builder[task.vpid] for task in group]
        for task in group:
            script = Script(self._builder[task.vpid])
            self._lock(task, script)
            yield from script.run()
        yield from stubs[0].alone(_clear_capabilities(stubs))
        for stub in stubs:
            require_no_capability(stub.tid)
        for task in group:
            script = Script(self._builder[task.vpid])
            yield from self._attributes.set(Stage.RIGHTS, task, script)
            yield from script.run()


def _clear_capabilities(stubs: Sequence[Stub]) -> Steps[None]:
    clear, show = Batch(), Batch()
    clear.call('prctl', PR_SET_DUMPABLE, SUID_DUMP_DISABLE, 0, 0, 0)
    clear.call('prctl', PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    clear.call('capset', clear.buffer(8, struct.pack('<Ii', LINUX_CAPABILITY_VERSION_3, 0)), clear.buffer(24))
    show.call('prctl', PR_SET_DUMPABLE, SUID_DUMP_USER, 0, 0, 0)
    first, arena = stubs[0], stubs[0].arena
    other = arena.table + arena.room // 2
    first.write(clear, arena.table)
    first.write(show, other)
    for stub in stubs:
        yield from stub.go(arena.table)
    yield from stubs[-1].go(other)


def require_no_capability(tid: int) -> None:
    """Check that a task has no capability in any set but the bounding set. CkptError."""
    status = read_status(tid)
    if status.cap_inh | status.cap_prm | status.cap_eff | status.cap_amb:
        raise CkptError(f'task {tid} keeps capabilities of the restart', task=tid, resource='capabilities',
                        hint='this is a bug of ckptd: nothing of the tree was started')


def dumpable_of(reader: ImageReader, group: Sequence[ImageTask]) -> int:
    """The final PR_SET_DUMPABLE(2const) value of an address space. Dead tasks have none that matters."""
    mm_id = next((task.record.mm_id for task in group if task.record.mm_id), 0)
    return reader.get(records.Mm, mm_id).dumpable if mm_id else SUID_DUMP_DISABLE

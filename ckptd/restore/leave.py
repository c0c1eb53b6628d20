# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of the stubs: the last calls of a task after the shed, and its way out of the arena.

Everything here is done with the rights of the tree itself. Only here may calls be made by which memory of the program
steers a task: restartable sequences, signal handlers, timers, pending signals, registers.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence

from ckptd.image.reader import ImageReader, ImageTask
from ckptd.kernel.arch.x86_64 import user_regs_struct
from ckptd.kernel.creds import SUID_DUMP_DISABLE, SUID_DUMP_USER
from ckptd.kernel.prctl import PR_SET_DUMPABLE
from ckptd.objects.attributes.base import Stage
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import Steps, finish, interleave
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.restore.attributes import TaskAttributes
from ckptd.restore.create import TaskBuilder
from ckptd.restore.creation_order import NewProcess
from ckptd.restore.job_control import Stops
from ckptd.restore.plan import Plan
from ckptd.restore.shed import dumpable_of
from ckptd.restore.sleeps import sleep_again

_BLOCK_ALL = (1 << 64) - 1


class Leave:
    """The last calls of every task. all_stopped: leave each process in a group-stop. check: raises Cancelled."""

    def __init__(self, reader: ImageReader, plan: Plan, builder: TaskBuilder, attributes: TaskAttributes, *,
                 all_stopped: bool, check: Callable[[], None]) -> None:
        self._reader, self._plan, self._builder, self._check = reader, plan, builder, check
        self._attributes = attributes
        self._stops = Stops(plan.processes, all_=all_stopped)
        self._results: dict[int, user_regs_struct] = {}     # results of calls that ended while they were begun again

    def run(self) -> None:
        """Let all tasks leave. Afterwards none is a stub, and all are still stopped."""
        self._stubs = Counter(task.record.mm_id for process in self._plan.processes for task in process.alive)
        running: list[NewProcess] = []
        # Stop children first, so that the SIGCHLD reaches parents that are still stubs, which discard it.
        for process in reversed(self._plan.processes):
            if process.alive and self._stops.signal_of(process):
                finish(self._last(process))
                self._go_all([process])
                self._stops.stop(process, self._builder)
            elif process.alive:
                running.insert(0, process)
        interleave(self._last(process) for process in running)
        self._go_all(running)

    def _go_all(self, processes: Sequence[NewProcess]) -> None:
        tasks = [task for process in processes for task in process.alive]
        self._stubs.subtract(task.record.mm_id for task in tasks)
        for task in tasks:
            # A stub reports by SIGTRAP, and on its way out by stops of the tracer. From here on a SIGTRAP can be
            # pending.
            self._builder[task.vpid].tracee.sigmask = _BLOCK_ALL
        # the pages of the stub go with their last user
        last = {task.record.mm_id: task for task in reversed(tasks) if not self._stubs[task.record.mm_id]}
        interleave(self._go(task, unmap=False) for task in tasks if last.get(task.record.mm_id) is not task)
        interleave(self._go(task, unmap=True) for task in last.values())
        for task in tasks:
            self._attributes.finish(task)
            if regs := self._results.get(task.vpid):
                self._builder[task.vpid].tracee.regs = regs

    def _last(self, process: NewProcess) -> Steps[None]:
        reader, builder = self._reader, self._builder
        first = process.alive[0]
        for task in process.alive:
            script = Script(builder[task.vpid])
            if task is first:
                # before there are timers, whose signals belong to the task
                yield from drain(builder[task.vpid])
            yield from self._attributes.set(Stage.AFTER_RIGHTS, task, script)
            yield from script.run()
            self._check()
            if (regs := (yield from sleep_again(reader, task.vpid, builder[task.vpid]))) is not None:
                self._results[task.vpid] = regs

    def _go(self, task: ImageTask, *, unmap: bool) -> Steps[None]:
        script = Script(self._builder[task.vpid])
        yield from self._attributes.set(Stage.FILTERS, task, script)
        batch = script.take()
        if unmap and os.geteuid() != 0 and dumpable_of(self._reader, [task]) != SUID_DUMP_USER:
            # from here on no memory of the task can be read or written, not even by us
            batch.call('prctl', PR_SET_DUMPABLE, SUID_DUMP_DISABLE, 0, 0, 0)
        yield from self._builder[task.vpid].leave(batch, unmap=unmap)


def drain(stub: Stub) -> Steps[None]:
    """Discard signals that were caused by making the tree: SIGCHLD of ghosts and zombies."""
    tracee = stub.tracee
    while tracee.pending(shared=True) or tracee.pending(shared=False):
        batch = Batch()
        everything, nothing = batch.buffer(8, b'\xff' * 8), batch.buffer(16)
        rows = [batch.call('rt_sigtimedwait', everything, 0, nothing, 8) for _ in range(4)]
        results = yield from stub.attempt(batch)
        if any(results.values[row] == -errno.EAGAIN for row in rows):
            return

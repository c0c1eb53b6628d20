# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ptrace freezer: seize and interrupt every thread, if no cgroup can be written.

Stopped tasks do not fork, so each scan finds fewer running ones. No journal is needed: if the tracer dies, the kernel
detaches the tracees and they run on.
"""

import os
import time

from ckptd.errors import PermissionDenied, TreeChanged
from ckptd.freezer.base import CannotFreezeError, FrozenTree, timed_out
from ckptd.freezer.groups import read_places, topmost_frozen
from ckptd.inspect.scan import is_alive
from ckptd.kernel.ptrace import PTRACE_EVENT_STOP, Tracee
from ckptd.kernel.signalfd import ChildSignals
from ckptd.kernel.status import read_status
from ckptd.kernel.yama import untraceable
from ckptd.tree import Task

ROUNDS = 64                 # of seizing tasks that were born meanwhile


class TracedFrozen(FrozenTree):
    """A tree frozen by ptrace. `tracees` has every living thread of `tree`, and a dump uses these."""
    mode = 'ptrace'

    def freeze(self) -> None:
        freeze_request = self._freeze_request
        self._refuse_frozen()
        if freeze_request.journal is not None:
            self._journal()
        with ChildSignals() as signals:
            awake = self._awake()
            for _ in range(ROUNDS):
                for task in awake:
                    self._seize(task)
                freeze_request.at('freeze-seize')
                for task in awake:
                    self._wait(task, awake, signals)
                freeze_request.at('freeze-seize-done')
                freeze_request.next_round()
                self.tree = freeze_request.rescan()
                awake = self._awake()
                if not awake:
                    return
        raise TreeChanged(f'{freeze_request.target.description} forks faster than it can be stopped', phase='freeze')

    def _awake(self) -> list[Task]:
        """List the living tasks that are not seized."""
        return [task for task in self.tree if not task.is_zombie and task.tid not in self.tracees]

    def let_run(self) -> None:
        """Do nothing, because each tracee is stopped by itself."""

    def _refuse_frozen(self) -> None:
        # a frozen task can be stopped, but runs no remote system call: it first goes back to the freezer's sleep
        context = self._freeze_request.context
        if not self._freeze_request.remote_calls or context.mount is None:
            return
        for place in set(read_places(self.tree).values()):
            if frozen := topmost_frozen(context, place):
                raise CannotFreezeError(f'cgroup {frozen} is frozen, so its tasks cannot run for a tracer')

    def _seize(self, task: Task, *, again: bool = True) -> None:
        try:
            tracee = Tracee.seize(task.tid)
            self.tracees[task.tid] = tracee
            tracee.interrupt()
        except ProcessLookupError:
            self.tracees.pop(task.tid, None)        # it died; the next scan does not find it
        except PermissionError as error:
            if not is_alive(task):
                return
            # In an execve(2) by another thread the leader dies (EPERM), and that thread takes its tid and lives.
            if not again:
                raise not_permitted(task, 'freeze') from error
            self._seize(task, again=False)

    def _wait(self, task: Task, awake: list[Task], signals: ChildSignals) -> None:
        freeze_request = self._freeze_request
        while not self._is_settled(task.tid):
            if time.monotonic() >= freeze_request.deadline:
                timed_out([other for other in awake if not self._is_settled(other.tid)], 'does not stop')
            signals.wait(freeze_request.deadline - time.monotonic(), freeze_request.also)
            freeze_request.check()
            self._forget_dead(task.tid)

    def _is_settled(self, tid: int) -> bool:
        """Whether it has stopped, or has died and is dropped. Does not wait."""
        tracee = self.tracees.get(tid)
        if tracee is None or tracee.stopped:
            return True
        try:
            status = tracee.poll()
            if status >> 16 == PTRACE_EVENT_STOP:
                return True
            if status:
                # a signal was being delivered; any trap clears the interrupt, so it must be requested again
                tracee.cont(os.WSTOPSIG(status))
                tracee.interrupt()
        except ProcessLookupError:
            del self.tracees[tid]
            return True
        return False

    def _forget_dead(self, tid: int) -> None:
        tracee = self.tracees.get(tid)
        if tracee and not tracee.stopped and tracee.has_died():
            tracee.reap()
            del self.tracees[tid]


def not_permitted(task: Task, phase: str) -> PermissionDenied:
    """Make the error for a living task that cannot be seized. It names the tracer or the security module if known."""
    try:
        tracer = read_status(task.tgid, task.tid).tracer_pid
    except ProcessLookupError:
        tracer = 0
    if tracer:
        reason, hint = f'is being traced by process {tracer}', 'detach the other tracer'
    else:
        forbidden = untraceable()
        reason, hint = f'may not be traced: {forbidden.reason}', forbidden.hint
    return PermissionDenied(f'{task.comm}[{task.tid}] {reason}', task=task.tid, resource='ptrace', phase=phase,
                            hint=hint)

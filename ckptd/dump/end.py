# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of a tree that is killed after its checkpoint.

    any tree    all processes get SIGKILL, and parents outside are told so
    a unit      its manager begins to stop it. Then its processes end before they see the manager's signal: first the
                roots, with exit status 0, then the others by SIGKILL

systemd calls a unit failed whose main process dies by SIGKILL, in a stop too (is_clean_exit() in systemd's
src/shared/exit-status.c), and one that dies without a stop job is started again if Restart= says so.
"""

from collections.abc import Callable
from contextlib import suppress
from signal import SIGKILL

from ckptd.faults import fault
from ckptd.freezer import FrozenTree
from ckptd.inspect.scan import Handles
from ckptd.kernel.ptrace import PTRACE_O_EXITKILL
from ckptd.kernel.reaping import wait_dead
from ckptd.operation.deadline import dying_patience
from ckptd.remote.leave import begin_exit
from ckptd.tree import Task


class TreeEnd:
    """The end of a tree whose tasks are stopped under ptrace. prepare: called when the tree is condemned and still
    whole."""

    def __init__(self, frozen: FrozenTree, handles: Handles, prepare: Callable[[], None]) -> None:
        self._frozen, self._handles, self._prepare = frozen, handles, prepare

    def run(self, stop: Callable[[], None] | None) -> None:
        """End every process of the tree at once, and wait until they are dead. stop: begins to stop the unit that is
        the tree; if it fails, the tree is as it was. None for other trees: parents outside are notified as of any
        death."""
        frozen, tree = self._frozen, self._frozen.tree
        if stop is None:
            frozen.condemn()
        else:
            if frozen.mode == 'unit':
                frozen.let_run()        # it may be frozen again, and systemd stops no frozen unit (since v256)
            stop()
            fault('kill-stop')
            # the processes cannot exit while they are frozen; if this one dies, they die with it
            for tracee in frozen.tracees.values():
                with suppress(ProcessLookupError):
                    tracee.set_options(PTRACE_O_EXITKILL)
            frozen.let_run()
            frozen.condemn(again=False)
        self._prepare()
        alive = tree.alive()
        exiting = {task.tgid for task in tree.leaders
                   if stop is not None and not task.depth and task.tgid in alive and self._exit(task)}
        for task in tree.leaders:
            if task.tgid in alive and task.tgid not in exiting:
                self._handles.send_signal(task, SIGKILL)
                fault('kill-one')
        # a tracer must see its tracees die; a Cancel has no effect now
        wait_dead([frozen.tracees.pop(task.tid) for task in tree if task.tid in frozen.tracees], dying_patience())

    def _exit(self, leader: Task) -> bool:
        """Let a process exit with status 0. False if it cannot."""
        for task in self._frozen.tree:
            if task.tgid == leader.tgid and (tracee := self._frozen.tracees.get(task.tid)):
                with suppress(OSError):
                    return begin_exit(tracee)
        return False

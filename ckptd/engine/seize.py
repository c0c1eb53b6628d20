# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every thread of a tree stopped under ptrace, with one owner."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

from ckptd.engine.faults import fault
from ckptd.errors import CkptError, PermissionDenied, TreeChanged
from ckptd.kernel.ptrace import Tracee
from ckptd.tree import Task, Tree


class Stopped:
    """Tracees by tid, all stopped. `with` detaches them: what was interrupted goes on as if nothing had happened.

    held: tracees that are stopped already (of a ptrace freezer); they stay their owner's.
    """

    def __init__(self, tree: Tree, held: Mapping[int, Tracee], deadline: float,
                 on_task: Callable[[int], None]) -> None:
        self.tracees: dict[int, Tracee] = dict(held)
        self._own: list[Tracee] = []
        self._tree, self._deadline, self._on_task = tree, deadline, on_task

    def __enter__(self) -> Self:
        try:
            todo = [task for task in self._tree if not task.is_zombie and task.tid not in self.tracees]
            for task in todo:
                self._seize(task)
            for count, task in enumerate(todo):
                self._wait(task)
                self._on_task(count)
        except BaseException:
            self.release()
            raise
        fault('seized')
        return self

    def _seize(self, task: Task) -> None:
        try:
            tracee = Tracee.seize(task.tid)
        except ProcessLookupError as error:
            raise _gone(task) from error
        except PermissionError as error:
            raise PermissionDenied(f'{task.comm}[{task.tid}] cannot be traced', task=task.tid, resource='ptrace',
                                   phase='seize', hint='is a debugger or strace attached to it?') from error
        self._own.append(tracee)
        self.tracees[task.tid] = tracee
        fault('seized-one')

    def _wait(self, task: Task) -> None:
        try:
            self.tracees[task.tid].stop(self._deadline)
        except ProcessLookupError as error:
            raise _gone(task) from error
        except TimeoutError as error:
            raise CkptError(f'{task.comm}[{task.tid}] does not stop', task=task.tid, resource='ptrace', phase='seize',
                            errno=error.errno) from error

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Detach all, in reverse."""
        while self._own:
            with suppress(ProcessLookupError):
                self._own.pop().detach()

    def reap(self) -> None:
        """After the tree was killed: see every tracee die, so that its parent gets to know."""
        for tracee in self.tracees.values():
            if tracee.attached:
                tracee.attached = False
                with suppress(ChildProcessError):
                    os.waitpid(tracee.tid, 0x40000000)


def _gone(task: Task) -> TreeChanged:
    return TreeChanged(f'{task.comm}[{task.tid}] died while it was stopped', task=task.tid, resource='task',
                       phase='seize')

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stop every thread of a frozen tree by ptrace, so that it stays stopped when the cgroup is thawed."""

from collections.abc import Callable

from ckptd.errors import FreezeTimeout, TreeChanged
from ckptd.faults import fault
from ckptd.freezer.traced import not_permitted
from ckptd.inspect.scan import is_alive
from ckptd.kernel.ptrace import Patience, Tracee
from ckptd.tree import Task, Tree


def seize_all(tree: Tree, tracees: dict[int, Tracee], deadline: float, patience: Patience,
              on_task: Callable[[int], None]) -> None:
    """Add every living thread that is not there yet, stopped. The owner of `tracees` detaches them, on failure too.
    patience: for all waits for them from here on."""
    for tracee in tracees.values():
        tracee.patience = patience
    todo = [task for task in tree if not task.is_zombie and task.tid not in tracees]
    for task in todo:
        tracees[task.tid] = _seize(task, patience)
        fault('seized-one')
    for count, task in enumerate(todo, 1):
        _stop(task, tracees[task.tid], deadline)
        on_task(count)
    fault('seized')


def _seize(task: Task, patience: Patience) -> Tracee:
    try:
        return Tracee.seize(task.tid, patience=patience)
    except ProcessLookupError as error:
        raise _gone(task) from error
    except PermissionError as error:
        # the kernel also returns this for a dead task that is not reaped (kernel/ptrace.c, ptrace_attach: exit_state)
        if not is_alive(task):
            raise _gone(task) from error
        raise not_permitted(task, 'seize') from error


def _stop(task: Task, tracee: Tracee, deadline: float) -> None:
    try:
        tracee.stop(deadline)
    except ProcessLookupError as error:
        raise _gone(task) from error
    except TimeoutError as error:
        raise FreezeTimeout(f'{task.comm}[{task.tid}] does not stop for its tracer', task=task.tid, resource='ptrace',
                            phase='seize') from error


def _gone(task: Task) -> TreeChanged:
    return TreeChanged(f'{task.comm}[{task.tid}] died while it was stopped', task=task.tid, resource='task',
                       phase='seize')

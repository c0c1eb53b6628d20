# SPDX-License-Identifier: LGPL-2.1-or-later
"""freeze=caller: the caller has already frozen the tree, and ckptd only checks that."""

from ckptd.errors import Finding, NotFrozen
from ckptd.journal.steps import StepContext
from ckptd.kernel.task import read_cgroup2
from ckptd.tree import Task, Tree


def check_frozen(tree: Tree, context: StepContext) -> list[Finding]:
    """List tasks that are neither in a frozen cgroup (cgroup.events, so also by a cgroup above) nor stopped by a
    signal."""
    known: dict[str, bool] = {}
    return [_refusal(task) for task in tree
            if not task.is_zombie and task.state not in 'Tt' and not _in_frozen(task, context, known)]


def _in_frozen(task: Task, context: StepContext, known: dict[str, bool]) -> bool:
    try:
        place = read_cgroup2(task.tid)
        if place not in known:
            known[place] = context.cgroup(place).frozen
    except ProcessLookupError:
        return True         # it died, which a scan will show
    except FileNotFoundError:
        return False
    return known[place]


def _refusal(task: Task) -> Finding:
    return Finding(task.tid, task.comm, 'state', 'EBUSY', f'not frozen (state {task.state})', NotFrozen.default_hint)

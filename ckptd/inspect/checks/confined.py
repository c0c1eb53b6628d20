# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a confined caller may reach: itself and what descends from it. The kernel asks no more than ids of who traces;
what a sandbox keeps a process from, ckptd would do for it.
"""

from ckptd.errors import Finding
from ckptd.inspect.checks.access import CallerRights
from ckptd.inspect.checks.rows import refuse
from ckptd.kernel.ancestry import is_below
from ckptd.kernel.confinement import hint_for, listed
from ckptd.tree import Tree


def check_confinement(tree: Tree, caller: CallerRights) -> list[Finding]:
    """A refusal for each task that is not below a caller who is confined."""
    if not caller.confinement:
        return []
    outside = {task.tgid for task in tree.leaders if not is_below(task.tgid, caller.pid, caller.start_time)}
    reason = f'is outside of what the caller may reach, confined by {listed(caller.confinement)}'
    return [refuse(task, 'confinement', 'EPERM', reason, hint_for(caller.confinement)) for task in tree
            if task.tgid in outside]

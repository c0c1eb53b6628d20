# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reach of a confined caller: itself and its descendants. For tracing, the kernel checks only ids. ckptd must not
do for a process what its sandbox denies."""

from ckptd.errors import Finding
from ckptd.inspect.checks.access import CallerRights
from ckptd.inspect.checks.rows import refuse
from ckptd.kernel.ancestry import is_below
from ckptd.kernel.confinement import hint_for, listed
from ckptd.tree import Tree


def check_confinement(tree: Tree, caller: CallerRights) -> list[Finding]:
    """List a refusal for each task that is not a confined caller itself or a descendant of it."""
    if not caller.confinement:
        return []
    outside = {task.tgid for task in tree.leaders if not is_below(task.tgid, caller.pid, caller.start_time)}
    reason = f'is outside of what the caller may reach, confined by {listed(caller.confinement)}'
    return [refuse(task, 'confinement', 'EPERM', reason, hint_for(caller.confinement)) for task in tree
            if task.tgid in outside]

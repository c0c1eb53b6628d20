# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks that tell why a tree cannot be dumped: every refusal of every task at once, and warnings of what will be lost.

    check_access    may the caller inspect these tasks? The kernel is asked with the caller's credentials
    hidden          tasks that /proc hides from the caller
    confined        tasks that a caller in a sandbox may not reach
    check_tasks     state, tracer, namespaces, kernel threads, 32-bit programs, attributes
    check_frozen    freeze=caller only: is everything at rest?
    check_vmas      mappings whose memory cannot be dumped
    check_files     open files of no known kind
    check_system_v  semaphores and message queues that are outside of the tree

For a task that the caller may not inspect, only that fact is reported.
"""

from collections.abc import Collection

from ckptd.errors import Finding
from ckptd.inspect.checks.access import CallerRights, check_access, is_untraceable
from ckptd.inspect.checks.confined import check_confinement
from ckptd.inspect.checks.files import check_files
from ckptd.inspect.checks.frozen import check_frozen
from ckptd.inspect.checks.hidden import without_hidden
from ckptd.inspect.checks.rows import refuse, told_dead
from ckptd.inspect.checks.system_v import check_system_v
from ckptd.inspect.checks.tasks import check_tasks
from ckptd.inspect.checks.vmas import check_vmas
from ckptd.inspect.proc_cache import ProcCache
from ckptd.tree import Tree

__all__ = ['CallerRights', 'check_access', 'check_confinement', 'check_files', 'check_frozen', 'check_rights',
           'check_tasks',
           'check_tree', 'check_vmas', 'is_untraceable', 'told_dead']


def check_tree(tree: Tree, caller: CallerRights, *, frozen_required: bool = False,
               avoid: Collection[int] = (), cache: ProcCache | None = None, trace: bool = False) -> list[Finding]:
    """List every refusal and warning, by check and in the tree's order. NotSupported if the kernel cannot be asked at
    all.

    frozen_required: the caller claims to have frozen the tree. avoid: processes that must not be in it. cache: of a
    tree at rest; other users of the cache reuse what the checks read. trace: ask the kernel whether the caller may
    trace each task.
    """
    cache = cache or ProcCache()
    visible = without_hidden(tree, caller)
    hidden = check_hidden(tree, visible, caller)
    found = [*(avoided := check_avoid(visible, avoid)), *check_access(visible, caller, trace=trace),
             *check_confinement(visible, caller)]
    denied = {refusal.pid for refusal in found}
    if 0 in denied or avoided:
        # A tree that contains the daemon is most of the machine. Reading all of it takes seconds and changes nothing.
        return told_dead(tree, hidden + found)
    seen = [task for task in visible if task.tid not in denied]
    found = hidden + found + check_tasks(visible, seen, cache, caller)
    if frozen_required:
        found += check_frozen(seen, caller.pid)
    found += check_vmas(seen, cache)
    found += check_files(seen, cache)
    found += check_system_v(seen, cache.sysv)
    return told_dead(tree, found)


def check_rights(tree: Tree, caller: CallerRights, avoid: Collection[int] = ()) -> list[Finding]:
    """Check what a freeze needs: the caller's right to each of these tasks."""
    visible = without_hidden(tree, caller)
    return (check_hidden(tree, visible, caller) + check_avoid(visible, avoid) + check_access(visible, caller)
            + check_confinement(visible, caller))


def check_hidden(tree: Tree, visible: Tree, caller: CallerRights) -> list[Finding]:
    """Make one row for all tasks that the caller cannot see. Only their existence is reported."""
    if len(visible) == len(tree) and not tree.unseen:
        return []
    return [Finding(0, '', 'ptrace', 'EPERM', f'has tasks that uid {caller.uid} does not see in /proc (hidepid=)',
                    'run as root')]


def check_avoid(tree: Tree, avoid: Collection[int]) -> list[Finding]:
    """Refuse the daemon, its bus and its worker, which a freeze would stop for good."""
    return [refuse(tree[pid], 'task', 'EDEADLK', 'is needed for the checkpoint itself and cannot be frozen',
                   'checkpoint a tree without it') for pid in avoid if pid in tree]

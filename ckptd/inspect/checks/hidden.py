# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which tasks the kernel hides from the caller (hidepid= of proc(5)). For a caller who is not root these are not there:
nothing is told of them, and not that they are.
"""

from collections.abc import Iterable
from contextlib import suppress

from ckptd.inspect.checks.access import CallerRights, probe
from ckptd.inspect.scan import is_same, no_process
from ckptd.kernel.ancestry import is_below
from ckptd.kernel.confinement import PID_NAMESPACE
from ckptd.kernel.hidepid import is_hidden_from
from ckptd.kernel.pidfd import held
from ckptd.kernel.task import read_namespaces
from ckptd.tree import Task, Tree

ANOTHER = 'another process'


def sees_all(caller: CallerRights) -> bool:
    """Whether /proc shows every process to the caller."""
    if PID_NAMESPACE in caller.confinement:
        return False        # whatever its /proc shows it, we are not in there
    return not caller.uid or not is_hidden_from({caller.gid, *caller.groups}, caller.pid, caller.start_time)


def without_hidden(tree: Tree, caller: CallerRights) -> Tree:
    """The tree as far as the caller sees it, which may be nothing of it."""
    if sees_all(caller):
        return tree
    return Tree(tuple(_visible(tree.tasks, caller)))


def require_visibility(pid: int, caller: CallerRights) -> None:
    """NoSuchTarget, in the words of a process that is not there, for one that the caller does not see."""
    if not sees_all(caller) and not _may_see([pid], caller)[0]:
        raise no_process(pid)


def name_of(pid: int, name: str, caller: CallerRights) -> str:
    """'NAME[PID]' for what another process is called, if the caller may know."""
    return f'{name}[{pid}]' if sees_all(caller) or _may_see([pid], caller)[0] else ANOTHER


def _visible(tasks: Iterable[Task], caller: CallerRights) -> list[Task]:
    tasks = list(tasks)
    answers = _may_see([task.tid for task in tasks], caller)
    # the kernel was asked about a number, which may be another task's since the scan: of the one that was scanned then
    # nothing is known
    return [task for task, visible in zip(tasks, answers, strict=True) if visible and is_same(task)]


def _may_see(tids: list[int], caller: CallerRights) -> list[bool]:
    """Whether each may be seen where /proc hides others: what /proc asks is what kcmp(2) asks. In a pid namespace of
    its own the caller sees what is in it, or below."""
    if PID_NAMESPACE in caller.confinement:
        return _in_namespace_of(caller, tids)
    answers = probe(caller, tids)
    return [False] * len(tids) if isinstance(answers, int) else [not answer for answer in answers]


def _in_namespace_of(caller: CallerRights, tids: list[int]) -> list[bool]:
    theirs = None
    with suppress(OSError), held(caller.pid, caller.start_time):
        theirs = _pid_namespace(caller.pid)
    return [is_below(tid, caller.pid, caller.start_time) or (theirs is not None and _pid_namespace(tid) == theirs)
            for tid in tids]


def _pid_namespace(pid: int) -> int | None:
    """None where that is not known."""
    try:
        return read_namespaces(pid).get('pid')
    except OSError:
        return None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks that the kernel hides from the caller (hidepid= of proc(5)). For a caller other than root they do not exist:
nothing is reported about them, not even their existence."""

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
        return False        # whatever its /proc shows, we are not in that namespace
    return not caller.uid or not is_hidden_from({caller.gid, *caller.groups}, caller.pid, caller.start_time)


def without_hidden(tree: Tree, caller: CallerRights) -> Tree:
    """Return the tree as far as the caller sees it, which may be empty."""
    if sees_all(caller):
        return tree
    return Tree(tuple(_visible(tree.tasks, caller)))


def require_visibility(pid: int, caller: CallerRights) -> None:
    """Check that the caller sees a process. Otherwise NoSuchTarget, with the words for a process that does not
    exist."""
    if not sees_all(caller) and not _may_see([pid], caller)[0]:
        raise no_process(pid)


def name_of(pid: int, name: str, caller: CallerRights) -> str:
    """Return 'NAME[PID]' of another process, if the caller may know it."""
    return f'{name}[{pid}]' if sees_all(caller) or _may_see([pid], caller)[0] else ANOTHER


def _visible(tasks: Iterable[Task], caller: CallerRights) -> list[Task]:
    tasks = list(tasks)
    answers = _may_see([task.tid for task in tasks], caller)
    # The kernel was asked about a tid, which may belong to another task since the scan. Then nothing is known about the
    # scanned task.
    return [task for task, visible in zip(tasks, answers, strict=True) if visible and is_same(task)]


def _may_see(tids: list[int], caller: CallerRights) -> list[bool]:
    """Return for each task whether the caller sees it where /proc hides others. /proc checks the same access as
    kcmp(2). In a pid namespace of its own, the caller sees what is in it or below."""
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
    """Return the inode of the pid namespace, None if unknown."""
    try:
        return read_namespaces(pid).get('pid')
    except OSError:
        return None

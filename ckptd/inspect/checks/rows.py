# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rows that all checks make, and the treatment of a task that vanishes or cannot be read during a check."""

import errno as errnos
from collections.abc import Callable, Iterable
from typing import NamedTuple, ParamSpec

from ckptd.errors import Finding
from ckptd.inspect.scan import is_alive
from ckptd.tree import Task, Tree

P = ParamSpec('P')


class ProcessIds(NamedTuple):
    """A process by its leader, and the thread through which /proc shows what all its threads share.

    reader: the first living thread. A leader that has exited before its threads shows neither files nor memory.
    """
    leader: Task
    reader: Task
    threads: tuple[Task, ...]


def processes(tasks: Iterable[Task]) -> list[ProcessIds]:
    """Return the processes of the tasks. A process that is only a zombie is left out."""
    groups: dict[int, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.tgid, []).append(task)
    return [ProcessIds(group[0], alive[0], tuple(alive)) for group in groups.values()
            if (alive := [task for task in group if not task.is_zombie])]


def refuse(task: Task, resource: str, errno: str, reason: str, hint: str) -> Finding:
    return Finding(task.tid, task.comm, resource, errno, reason, hint)


def warn(task: Task, resource: str, errno: str, reason: str, hint: str) -> Finding:
    return Finding(task.tid, task.comm, resource, errno, reason, hint, 'warning')


def dead(task: Task) -> Finding:
    return refuse(task, 'task', 'EAGAIN', 'died during the scan', 'try again')


def told_dead(tree: Tree, found: Iterable[Finding]) -> list[Finding]:
    """Return each row once. A refusal of a task that has died since may be a consequence of its death: it no longer has
    files, namespaces or memory, and its tid may be reused. So its death is reported instead."""
    rows = list(dict.fromkeys(found))
    died = {pid for pid in {row.pid for row in rows if row.severity == 'refusal'}
            if pid in tree and not is_alive(tree[pid])}
    return list(dict.fromkeys(dead(tree[row.pid]) if row.pid in died else row for row in rows))


def guarded(task: Task, resource: str, check: Callable[P, list[Finding]], *args: P.args,
            **kwargs: P.kwargs) -> list[Finding]:
    """Return the findings of check(*args). A task that is gone, or that we may not read, is a finding, too."""
    try:
        return check(*args, **kwargs)
    except ProcessLookupError:
        return [dead(task)]
    except PermissionError as error:
        return [refuse(task, resource, 'EPERM', f'ckptd may not read it: {error.filename or error.strerror}',
                       'run ckptd as root, or as the owner of the tree with the task dumpable (prctl PR_SET_DUMPABLE)')]
    except OSError as error:
        if error.errno != errnos.ENAMETOOLONG:
            raise
        return [refuse(task, resource, 'ENAMETOOLONG', f'the path of {error.filename} is longer than 4095 bytes',
                       'no system call returns such a path: use a shorter one')]

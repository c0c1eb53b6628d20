# SPDX-License-Identifier: LGPL-2.1-or-later
"""freeze=caller: check that every task is at rest, as the caller claims."""

from collections.abc import Iterable

from ckptd.errors import Finding
from ckptd.inspect.checks.rows import guarded, refuse
from ckptd.kernel.cgroup import Cgroup, CgroupMount, find_mount
from ckptd.kernel.task import read_cgroup2
from ckptd.tree import Task


def check_frozen(tasks: Iterable[Task], self_pid: int) -> list[Finding]:
    """List EBUSY for each task whose cgroup is not frozen. The calling process `self_pid` is exempt, because it waits
    for us."""
    states = _Cgroups()
    found: list[Finding] = []
    for task in tasks:
        if task.tgid != self_pid and not task.is_zombie:
            found += guarded(task, 'cgroup', _check, task, states)
    return found


def _check(task: Task, states: '_Cgroups') -> list[Finding]:
    path = read_cgroup2(task.tid)
    if states.frozen(path):
        return []
    return [refuse(task, 'cgroup', 'EBUSY', f'is not frozen (cgroup {path or "none"})',
                   'freeze the tree first, or leave out freeze=caller')]


class _Cgroups:
    """The contents of cgroup.events of each cgroup, read once."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}
        self._mount: CgroupMount | None = None

    def frozen(self, path: str) -> bool:
        if path not in self._known:
            self._known[path] = self._read(path)
        return self._known[path]

    def _read(self, path: str) -> bool:
        try:
            self._mount = self._mount or find_mount()
            return Cgroup(self._mount.directory(path or '/')).frozen
        except FileNotFoundError:
            return False

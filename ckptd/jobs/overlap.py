# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tell whether two targets share tasks, as far as a quick look at /proc shows.

The result is a hint and not a lock, because trees change and another daemon may be at work. If a second job starts all
the same, the kernel refuses it, since a task can have only one tracer.

The ancestors of a process are read once, when a request comes in. Later it has the same or fewer: an orphan is given to
one of its ancestors, to pid 1 (prctl(2), PR_SET_CHILD_SUBREAPER), or to the first process of a pid namespace that it
had entered. Each ancestor is stored with its start time, so that a reused pid is noticed.
"""

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2
from ckptd.kernel.units import units_of
from ckptd.target import CgroupTarget, ProcessTarget, Target, UnitTarget
from ckptd.tree import TaskId

MOST: Final = 128       # ancestors that are read, some 30 us each; more distant ones are ignored
NONE: Final[Mapping[Target, 'Lineage']] = {}

Lineage = tuple[TaskId, ...]    # a process and its ancestors, nearest first, without pid 1, which is never dumped


def overlap(one: Target, other: Target) -> bool:
    """Whether two targets share tasks."""
    return Relations().overlap(one, other)


class Relations:
    """Relations between many targets. Each target is read once. known: lineages that were read before."""

    def __init__(self, known: Mapping[Target, Lineage] = NONE) -> None:
        self._lineages = dict(known)
        self._cgroups: dict[int, str] = {}

    def lineage(self, target: Target) -> Lineage:
        """Return the lineage of the root of a process's tree. Empty for other targets and for a process that does not
        exist."""
        if target not in self._lineages:
            self._lineages[target] = _lineage(target.pid) if isinstance(target, ProcessTarget) else ()
        return self._lineages[target]

    def overlap(self, one: Target, other: Target) -> bool:
        """Whether two targets share tasks. Two units are compared by name. A unit and another target are compared by
        cgroup names, which systemd takes from unit names."""
        match one, other:
            case UnitTarget(), UnitTarget():
                return one == other
            case (UnitTarget() as unit, another) | (another, UnitTarget() as unit):
                return unit.name in units_of(self._cgroup_of(another), os.geteuid())
            case ProcessTarget(), ProcessTarget():
                first, second = self.lineage(one), self.lineage(other)
                return one == other or (bool(first and second) and (first[0] in second or second[0] in first))
            case CgroupTarget(), CgroupTarget():
                return _contains(one.path, other.path) or _contains(other.path, one.path)
            case (CgroupTarget() as cgroup, process) | (process, CgroupTarget() as cgroup):
                # check the root only: its descendants are mostly in the same cgroup
                return _contains(cgroup.path, self._cgroup_of(process))
        return False

    def _cgroup_of(self, target: Target) -> str:
        """Return the cgroup of the root of the tree, or '' if there is none."""
        match target:
            case CgroupTarget():
                return target.path
            case ProcessTarget():
                return self._cgroup(target.pid)
        return ''

    def _cgroup(self, pid: int) -> str:
        if pid not in self._cgroups:
            try:
                self._cgroups[pid] = read_cgroup2(pid)
            except ProcessLookupError:
                self._cgroups[pid] = ''
        return self._cgroups[pid]


def _lineage(pid: int) -> Lineage:
    found: list[TaskId] = []
    while pid > 1 and len(found) < MOST:
        try:
            stat = read_stat(pid)
        except ProcessLookupError:
            break
        found.append(TaskId(pid, stat.start_time))
        pid = stat.ppid
    return tuple(found)


def _contains(outer: str, inner: str) -> bool:
    return PurePosixPath(inner).is_relative_to(outer)

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
from ckptd.tree import TaskId

MOST: Final = 128       # ancestors that are read, some 30 us each; more distant ones are ignored
NONE: Final[Mapping[str, 'Lineage']] = {}

Lineage = tuple[TaskId, ...]    # a process and its ancestors, nearest first, without pid 1, which is never dumped


def overlap(one: str, other: str) -> bool:
    """Whether two targets share tasks."""
    return Relations().overlap(one, other)


class Relations:
    """Relations between many targets. Each target is read once. known: lineages that were read before."""

    def __init__(self, known: Mapping[str, Lineage] = NONE) -> None:
        self._lineages = dict(known)
        self._cgroups: dict[int, str] = {}

    def lineage(self, target: str) -> Lineage:
        """Return the lineage of the root of a tree pid:N. Empty for other targets and for a process that does not
        exist."""
        if target not in self._lineages:
            kind, _, rest = target.partition(':')
            self._lineages[target] = _lineage(int(rest)) if kind == 'pid' else ()
        return self._lineages[target]

    def overlap(self, one: str, other: str) -> bool:
        """Whether two targets, as parse_target spells them, share tasks. Two units are compared by name. A unit and
        another target are compared by cgroup names, which systemd takes from unit names."""
        if one == other:
            return True
        for unit, another in ((one, other), (other, one)):
            if ':' not in unit:
                return ':' in another and unit in units_of(self._cgroup_of(another), os.geteuid())
        kinds = {target.partition(':')[0]: target.partition(':')[2] for target in (one, other)}
        if kinds.keys() == {'pid'}:
            first, second = self.lineage(one), self.lineage(other)
            return bool(first and second) and (first[0] in second or second[0] in first)
        if kinds.keys() == {'cgroup'}:
            return _contains(one, other) or _contains(other, one)
        if kinds.keys() == {'pid', 'cgroup'}:
            # check the root only: its descendants are mostly in the same cgroup
            return _contains(kinds['cgroup'], self._cgroup(int(kinds['pid'])))
        return False

    def _cgroup_of(self, target: str) -> str:
        """Return the cgroup of the root of the tree, or '' if there is none."""
        kind, _, rest = target.partition(':')
        return rest if kind == 'cgroup' else self._cgroup(int(rest))

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
    return PurePosixPath(inner.removeprefix('cgroup:')).is_relative_to(outer.removeprefix('cgroup:'))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether two targets share tasks, as far as /proc can tell at once.

A hint, not a lock: trees change, and another daemon may be at work. Who comes second all the same is refused by the
kernel, which lets a task have one tracer.

The parents of a process are looked at once, when a target is taken in: later it has the same or fewer, for an orphan
goes to one of them, to 1 (prctl(2), PR_SET_CHILD_SUBREAPER), or to the first of a pid namespace that it had entered.
Each has its start time, so that a number is no other's.
"""

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Final

from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2
from ckptd.kernel.units import units_of
from ckptd.tree import TaskId

MOST: Final = 128       # processes that are looked at, some 30 us each: who is further up is related to nobody below
NONE: Final[Mapping[str, 'Lineage']] = {}

Lineage = tuple[TaskId, ...]    # a process and its parents, nearest first, without 1: nobody dumps that


def overlap(one: str, other: str) -> bool:
    """Of two targets alone."""
    return Relations().overlap(one, other)


class Relations:
    """Of many targets, each of which is looked at once. known: what was seen of some before."""

    def __init__(self, known: Mapping[str, Lineage] = NONE) -> None:
        self._lineages = dict(known)
        self._cgroups: dict[int, str] = {}

    def lineage(self, target: str) -> Lineage:
        """Of the root of a tree pid:N; of another target, or where there is no process, empty."""
        if target not in self._lineages:
            kind, _, rest = target.partition(':')
            self._lineages[target] = _lineage(int(rest)) if kind == 'pid' else ()
        return self._lineages[target]

    def overlap(self, one: str, other: str) -> bool:
        """Two targets as parse_target spells them. Of two units the names are compared alone; with others the names of
        cgroups, which systemd calls as their units."""
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
            # the root is in it; its descendants mostly are where it is
            return _contains(kinds['cgroup'], self._cgroup(int(kinds['pid'])))
        return False

    def _cgroup_of(self, target: str) -> str:
        """That of the root of the tree; '' where there is none."""
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

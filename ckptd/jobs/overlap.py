# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether two targets share tasks, as far as /proc can tell at once.

A hint, not a lock: trees change, and another daemon may be at work. Who comes second all the same is refused by the
kernel, which lets a task have one tracer.
"""

import os
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Final

from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2
from ckptd.kernel.units import units_of

MOST: Final = 500       # parents that are looked at, some 30 us each: whoever is deeper down is related to nobody


def overlap(one: str, other: str) -> bool:
    """Of two targets alone."""
    return Relations().overlap(one, other)


class Relations:
    """Of many targets, now: each process is looked at once."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._cgroups: dict[int, str] = {}

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
            first, second = int(one.removeprefix('pid:')), int(other.removeprefix('pid:'))
            return first in self._ancestors(second) or second in self._ancestors(first)
        if kinds.keys() == {'cgroup'}:
            return _contains(one, other) or _contains(other, one)
        if kinds.keys() == {'pid', 'cgroup'}:
            # the root is in it; its descendants mostly are where it is
            return _contains(kinds['cgroup'], self._cgroup(int(kinds['pid'])))
        return False

    def _ancestors(self, pid: int) -> Iterator[int]:
        """The parents of a process, nearest first, without 1: that is everybody's, and nobody dumps it."""
        for _ in range(MOST):
            if pid not in self._parents:
                try:
                    self._parents[pid] = read_stat(pid).ppid
                except ProcessLookupError:
                    self._parents[pid] = 0
            pid = self._parents[pid]
            if pid <= 1:
                return
            yield pid

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


def _contains(outer: str, inner: str) -> bool:
    return PurePosixPath(inner.removeprefix('cgroup:')).is_relative_to(outer.removeprefix('cgroup:'))

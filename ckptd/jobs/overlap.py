# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether two targets share tasks, as far as /proc can tell at once.

A hint, not a lock: trees change, and another daemon may be at work. Who comes second all the same is refused by the
kernel, which lets a task have one tracer.
"""

import os
from collections.abc import Iterator
from pathlib import PurePosixPath

from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2
from ckptd.kernel.units import units_of


def overlap(one: str, other: str) -> bool:
    """Two targets as parse_target spells them. Of two units the names are compared alone; with others the names of
    cgroups, which systemd calls as their units."""
    if one == other:
        return True
    for unit, another in ((one, other), (other, one)):
        if ':' not in unit:
            return ':' in another and unit in units_of(_cgroup_of(another), os.geteuid())
    kinds = {target.partition(':')[0]: target.partition(':')[2] for target in (one, other)}
    if kinds.keys() == {'pid'}:
        first, second = int(one.removeprefix('pid:')), int(other.removeprefix('pid:'))
        return first in ancestors(second) or second in ancestors(first)
    if kinds.keys() == {'cgroup'}:
        return _contains(one, other) or _contains(other, one)
    if kinds.keys() == {'pid', 'cgroup'}:
        return _is_in(int(kinds['pid']), f'cgroup:{kinds["cgroup"]}')
    return False


def ancestors(pid: int) -> Iterator[int]:
    """The parents of a process, nearest first, without 1: that is everybody's, and nobody dumps it."""
    try:
        while (pid := read_stat(pid).ppid) > 1:
            yield pid
    except ProcessLookupError:
        return


def _cgroup_of(target: str) -> str:
    """That of the root of the tree; '' where there is none."""
    kind, _, rest = target.partition(':')
    if kind == 'cgroup':
        return rest
    try:
        return read_cgroup2(int(rest))
    except ProcessLookupError:
        return ''


def _contains(outer: str, inner: str) -> bool:
    return PurePosixPath(inner.removeprefix('cgroup:')).is_relative_to(outer.removeprefix('cgroup:'))


def _is_in(pid: int, cgroup: str) -> bool:
    """The root of the tree is; its descendants mostly are where it is."""
    try:
        return _contains(cgroup, f'cgroup:{read_cgroup2(pid)}')
    except ProcessLookupError:
        return False

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bounds of a process and of all its descendants: limits, priority, cgroups, login uid."""

import os
from typing import NamedTuple

from ckptd.kernel.cgroup1 import Cgroup1Path, read_places
from ckptd.kernel.pidfd import held
from ckptd.kernel.task import read_cgroup2, read_limits, read_loginuid, read_oom_score_adj


class Bounds(NamedTuple):
    """The bounds of a process."""
    limits: tuple[tuple[int, int], ...] = ()    # (soft, hard) by RLIMIT_* number
    oom_score_adj: int = 0
    nice: int = 0
    loginuid: int = -1                           # -1 for none
    cgroup: str = ''                             # in the v2 hierarchy, '' without one
    old_cgroups: tuple[Cgroup1Path, ...] = ()    # in the v1 hierarchies that limit resources


def read_bounds(pid: int, start_time: int, uid: int) -> Bounds:
    """Read the bounds of the process with this start time that belongs to this user only. ProcessLookupError if it has
    ended."""
    with held(pid, start_time, uid):
        return Bounds(read_limits(pid), read_oom_score_adj(pid), os.getpriority(os.PRIO_PROCESS, pid),
                      read_loginuid(pid), read_cgroup2(pid), read_places(pid))

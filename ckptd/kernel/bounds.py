# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bounds of a process and of all that it starts: limits, priority, cgroups, login uid."""

import os
from typing import NamedTuple

from ckptd.kernel.cgroup1 import Cgroup1Path, read_places
from ckptd.kernel.pidfd import held
from ckptd.kernel.task import read_cgroup2, read_limits, read_loginuid, read_oom_score_adj


class Bounds(NamedTuple):
    """limits: (soft, hard) by RLIMIT_* number. loginuid: -1 for none. cgroup: of the v2 hierarchy, '' without one.
    old_cgroups: of those v1 hierarchies that limit what runs."""
    limits: tuple[tuple[int, int], ...] = ()
    oom_score_adj: int = 0
    nice: int = 0
    loginuid: int = -1
    cgroup: str = ''
    old_cgroups: tuple[Cgroup1Path, ...] = ()


def read_bounds(pid: int, start_time: int, uid: int) -> Bounds:
    """Read those of the process that began then and is this user's alone. ProcessLookupError if it is no more."""
    with held(pid, start_time, uid):
        return Bounds(read_limits(pid), read_oom_score_adj(pid), os.getpriority(os.PRIO_PROCESS, pid),
                      read_loginuid(pid), read_cgroup2(pid), read_places(pid))

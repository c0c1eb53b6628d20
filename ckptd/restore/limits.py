# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits, priorities and locked memory that a tree may have: those of the image, or the nearest that we may set.

A restart is refused where the two differ (obstacles/resources.py), unless its caller accepts the nearest (clamp).
"""

import dataclasses
import functools
import os
import resource
from collections.abc import Iterable, Sequence

from ckptd.image.reader import ImageReader
from ckptd.image.records import Limit, Limits, ProcessState, Scheduling, Vma
from ckptd.kernel.creds import CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_RESOURCE, capget
from ckptd.kernel.procfs import read_file
from ckptd.kernel.task import read_oom_score_adj

# <asm-generic/resource.h>
NOFILE, MEMLOCK, NICE, RTPRIO = 7, 8, 13, 14
LIMITS = 16
INFINITY = (1 << 64) - 1
# <linux/sched.h>
SCHED_DEADLINE, SCHED_FLAG_RESET_ON_FORK = 6, 1
REAL_TIME = (os.SCHED_FIFO, os.SCHED_RR)
# <linux/ioprio.h>
IOPRIO_CLASS_SHIFT, IOPRIO_CLASS_RT, IOPRIO_CLASS_BE = 13, 1, 2


class Allowed:
    """The values that we may set. hard_limits: those of the calling process by RLIMIT_* number, if they bind the tree
    and not us."""

    def __init__(self, reader: ImageReader, hard_limits: Sequence[int]) -> None:
        self._reader, self._hard_limits = reader, hard_limits
        self._capabilities = capget().effective
        self._limits: dict[int, tuple[Limit, ...]] = {}
        self._most = tuple(self._highest(number) for number in range(LIMITS))
        self._nice, self._policy = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)

    def may(self, capability: int) -> bool:
        return bool(self._capabilities >> capability & 1)

    # ------------------------------------------------------------ limits

    def limits(self, vpid: int) -> tuple[Limit, ...]:
        """Limits of a process, by number."""
        if vpid not in self._limits:
            wanted = self._reader.get(Limits, vpid).limits
            self._limits[vpid] = tuple(map(_nearest, wanted, self._most))
        return self._limits[vpid]

    def _highest(self, number: int) -> int:
        """The highest hard limit that we may set."""
        if self.may(CAP_SYS_RESOURCE):
            most = INFINITY
        else:
            own = resource.getrlimit(number)[1]
            most = INFINITY if own == resource.RLIM_INFINITY else own
            most = min(most, self._hard_limits[number]) if number < len(self._hard_limits) else most
        return min(most, nr_open()) if number == NOFILE else most

    # ------------------------------------------------------------ oom_score_adj

    def oom_score_adj(self, vpid: int) -> int:
        """The oom_score_adj of a process, -1000 to 1000."""
        wanted, own = self._reader.get(ProcessState, vpid).oom_score_adj - 1000, read_oom_score_adj(os.getpid())
        may = wanted >= own or self.may(CAP_SYS_RESOURCE) or _can_lower_oom_score_adj(wanted)
        return wanted if may else own

    # ------------------------------------------------------------ scheduling

    def scheduling(self, vpid: int, leader: int) -> Scheduling:
        """Scheduling of a task of the process `leader`, within the limits that the task has by then.

        See user_check_sched_setscheduler() and can_nice() in kernel/sched/syscalls.c.
        """
        record = self._reader.get(Scheduling, vpid)
        ioprio = record.ioprio
        if ioprio >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_RT and not (self.may(CAP_SYS_NICE) or self.may(CAP_SYS_ADMIN)):
            record = dataclasses.replace(record, ioprio=IOPRIO_CLASS_BE << IOPRIO_CLASS_SHIFT)
        if self.may(CAP_SYS_NICE):
            return record
        limits = self.limits(leader)
        nice = max(record.nice - 20, min(self._nice, 20 - limits[NICE].soft))
        flags = record.flags | (SCHED_FLAG_RESET_ON_FORK if self._policy & os.SCHED_RESET_ON_FORK else 0)
        record = dataclasses.replace(record, nice=nice + 20, flags=flags)
        if record.policy == SCHED_DEADLINE:
            return dataclasses.replace(record, policy=os.SCHED_OTHER, runtime=0, deadline=0, period=0)
        if record.policy not in REAL_TIME:
            return record
        most = limits[RTPRIO].soft
        if not most:
            return dataclasses.replace(record, policy=os.SCHED_OTHER, priority=0)
        return dataclasses.replace(record, priority=min(record.priority, most))

    # ------------------------------------------------------------ locked memory

    def lockable(self, vpid: int) -> int:
        """Bytes that a process may lock."""
        return INFINITY if self.may(CAP_IPC_LOCK) else self.limits(vpid)[MEMLOCK].soft

    def locked(self, vpid: int, vmas: Iterable[Vma]) -> frozenset[int]:
        """Start addresses of the mappings that are locked: from the lowest on, as many as the limit allows."""
        room, starts = self.lockable(vpid), []
        for vma in vmas:
            if vma.locked and vma.end - vma.start <= room:
                room -= vma.end - vma.start
                starts.append(vma.start)
        return frozenset(starts)


def _nearest(wanted: Limit, most: int) -> Limit:
    return wanted if wanted.hard <= most else Limit(min(wanted.soft, most), most)


@functools.cache
def nr_open() -> int:
    """The sysctl fs.nr_open: the most of RLIMIT_NOFILE, whoever asks (kernel/sys.c, do_prlimit)."""
    return int(read_file('/proc/sys/fs/nr_open'))


def _can_lower_oom_score_adj(value: int) -> bool:
    """Try the value and set the old one back. The kernel allows values down to oom_score_adj_min (fs/proc/base.c),
    which no file shows."""
    own = read_oom_score_adj(os.getpid())
    try:
        _set_oom_score_adj(value)
    except OSError:
        return False
    _set_oom_score_adj(own)
    return True


def _set_oom_score_adj(value: int) -> None:
    fd = os.open('/proc/self/oom_score_adj', os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)

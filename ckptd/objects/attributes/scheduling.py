# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scheduling of a thread: policy, priority, processors, I/O priority; and its timer slack."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from ckptd.errors import CkptError, Finding
from ckptd.image.reader import ImageTask
from ckptd.image.records import Scheduling
from ckptd.kernel.creds import CAP_SYS_ADMIN, CAP_SYS_NICE
from ckptd.kernel.prctl import PR_GET_TIMERSLACK, PR_SET_TIMERSLACK
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.sched import SchedAttr, ioprio_get, ioprio_set, sched_getattr, sched_setattr
from ckptd.objects.attributes.allowed import NICE, RTPRIO, Allowed
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    Fields,
    Reader,
    RestartRights,
    RestoredTask,
    Stage,
    about,
)
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch

# <linux/sched.h>
SCHED_DEADLINE, SCHED_FLAG_RESET_ON_FORK = 6, 1
_REAL_TIME = (os.SCHED_FIFO, os.SCHED_RR)
# <linux/ioprio.h>
IOPRIO_CLASS_SHIFT, IOPRIO_CLASS_RT, IOPRIO_CLASS_BE = 13, 1, 2
_HINT = 'run ckptd with CAP_SYS_NICE'
_Seen: TypeAlias = tuple[SchedAttr, frozenset[int], int]      # attributes, processors, I/O priority


class TimerSlack(Attribute[Scheduling, int], name='timer slack'):
    """The timer slack (PR_SET_TIMERSLACK(2const)). A thread with a real-time policy keeps its earlier one, so this is
    set before the policy."""
    support = Support('timer slack')

    def ask(self, batch: Batch) -> Reader[int]:
        call = batch.call('prctl', PR_GET_TIMERSLACK)
        return lambda results: results.unsigned(call)

    def dump(self, of: DumpedTask, answer: int) -> Fields:
        return {'timer_slack': answer}

    def restore(self, record: Scheduling, to: RestoredTask) -> None:
        to.script.call('prctl', PR_SET_TIMERSLACK, record.timer_slack)


class SchedulingPolicy(Attribute[Scheduling, _Seen], name='scheduling', stage=Stage.LIMITS):
    """The scheduling policy. It is set from outside while the stub has our rights, after the limits of the process."""
    support = Support('scheduling: policy, priority, processors, I/O priority',
                      refused='higher priorities than the caller of the restart may set; --clamp accepts the nearest',
                      warned='processors that are not there')

    def look(self, tracee: Tracee) -> _Seen:
        tid = tracee.tid
        attr = sched_getattr(tid)
        if attr.policy == SCHED_DEADLINE or attr.policy in _REAL_TIME:
            # their nice value is not in the answer (kernel/sched/syscalls.c, get_params), and counts when they leave it
            attr = attr._replace(nice=os.getpriority(os.PRIO_PROCESS, tid))
        return attr, frozenset(os.sched_getaffinity(tid)), ioprio_get(tid)

    def dump(self, of: DumpedTask, answer: _Seen) -> Fields:
        attr, processors, ioprio = answer
        mask = sum(1 << cpu for cpu in processors)
        return {'policy': attr.policy, 'flags': attr.flags, 'nice': attr.nice + 20, 'priority': attr.priority,
                'runtime': attr.runtime, 'deadline': attr.deadline, 'period': attr.period,
                'affinity': mask.to_bytes((mask.bit_length() + 63) // 64 * 8, 'little'), 'ioprio': ioprio,
                'util_min': attr.util_min, 'util_max': attr.util_max}

    def obstacles(self, record: Scheduling, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        nearest, vpid = nearest_scheduling(record, task.vtgid, rights.allowed), task.vpid
        for what, comes in _privileged(record, nearest):
            yield rights.beyond(about(vpid, 'scheduling', 'EPERM', f'{what}, which needs a privilege', _HINT), comes)
        if record.ioprio != nearest.ioprio and record.ioprio >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_RT:
            yield rights.beyond(about(vpid, 'I/O priority', 'EPERM', 'its I/O is of the real-time class, which needs a '
                                      'privilege', _HINT), 'with the best-effort class')
        if missing := sorted(_processors(record) - os.sched_getaffinity(0)):
            yield about(vpid, 'processors', 'EINVAL', f'ran on processors {ranges_of(missing)} too, which are not '
                        'there or not ours', 'it runs on the others', 'warning')

    def restore(self, record: Scheduling, to: RestoredTask) -> None:
        record, tid = nearest_scheduling(record, to.task.vtgid, to.means.allowed), to.tid
        here = os.sched_getaffinity(0)
        os.sched_setaffinity(tid, _processors(record) & here or here)
        try:
            # sched_setattr(2) takes a nice value for these policies only, but all policies keep one
            os.setpriority(os.PRIO_PROCESS, tid, record.nice - 20)
            sched_setattr(tid, SchedAttr(record.policy, record.flags, record.nice - 20, record.priority, record.runtime,
                                         record.deadline, record.period, record.util_min, record.util_max))
            ioprio_set(tid, record.ioprio)
        except OSError as error:
            raise CkptError(f'the scheduling of task {record.vpid} cannot be restored: {error}', errno=error.errno,
                            task=tid, resource='scheduling', hint=_HINT) from error


def nearest_scheduling(record: Scheduling, vtgid: int, allowed: Allowed) -> Scheduling:
    """Return the scheduling that we may give a task within the limits that its process then has.

    See user_check_sched_setscheduler() and can_nice() in kernel/sched/syscalls.c.
    """
    ioprio = record.ioprio
    if ioprio >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_RT and not (allowed.may(CAP_SYS_NICE)
                                                                or allowed.may(CAP_SYS_ADMIN)):
        record = dataclasses.replace(record, ioprio=IOPRIO_CLASS_BE << IOPRIO_CLASS_SHIFT)
    if allowed.may(CAP_SYS_NICE):
        return record
    limits = allowed.limits(vtgid)
    nice = max(record.nice - 20, min(os.getpriority(os.PRIO_PROCESS, 0), 20 - limits[NICE].soft))
    flags = record.flags | (SCHED_FLAG_RESET_ON_FORK if os.sched_getscheduler(0) & os.SCHED_RESET_ON_FORK else 0)
    record = dataclasses.replace(record, nice=nice + 20, flags=flags)
    if record.policy == SCHED_DEADLINE:
        return dataclasses.replace(record, policy=os.SCHED_OTHER, runtime=0, deadline=0, period=0)
    if record.policy not in _REAL_TIME:
        return record
    most = limits[RTPRIO].soft
    if not most:
        return dataclasses.replace(record, policy=os.SCHED_OTHER, priority=0)
    return dataclasses.replace(record, priority=min(record.priority, most))


def _processors(record: Scheduling) -> set[int]:
    return {cpu for cpu in range(len(record.affinity) * 8) if record.affinity[cpu // 8] >> cpu % 8 & 1}


def _privileged(record: Scheduling, nearest: Scheduling) -> Iterator[tuple[str, str]]:
    """Yield pairs: a value that is not allowed, and the one that the task gets instead."""
    ordinary = 'with the policy SCHED_OTHER'
    if record.policy == SCHED_DEADLINE != nearest.policy:
        yield 'its policy is SCHED_DEADLINE', ordinary
    elif record.policy in _REAL_TIME and (record.policy, record.priority) != (nearest.policy, nearest.priority):
        yield (f'has real-time priority {record.priority}',
               ordinary if nearest.policy != record.policy else f'with priority {nearest.priority}')
    if record.nice != nearest.nice:
        yield (f'its nice value is {record.nice - 20}, ours {os.getpriority(os.PRIO_PROCESS, 0)}',
               f'with {nearest.nice - 20}')
    if record.flags != nearest.flags:
        yield 'has no SCHED_RESET_ON_FORK, as ckptd has', 'with it'


def ranges_of(numbers: list[int]) -> str:
    """Format numbers as '2-5, 9'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ', '.join('-'.join(map(str, run)) for run in runs)

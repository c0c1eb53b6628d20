# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of what takes a privilege to be set: hard limits, oom_score_adj, scheduling, locked memory.

With `clamp` a refusal becomes a warning that names the nearest value.
"""

import os
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import Limits, PosixTimers, ProcessState, Scheduling, Vma
from ckptd.kernel.creds import CAP_SYS_RAWIO, CAP_WAKE_ALARM
from ckptd.kernel.procfs import read_file
from ckptd.kernel.task import read_oom_score_adj
from ckptd.kernel.timerfd import ALARM_CLOCKS
from ckptd.restore.checks.context import CheckContext, about, once
from ckptd.restore.limits import (
    INFINITY,
    IOPRIO_CLASS_RT,
    IOPRIO_CLASS_SHIFT,
    MEMLOCK,
    NOFILE,
    REAL_TIME,
    SCHED_DEADLINE,
    nr_open,
)

# by number, <asm-generic/resource.h>
_LIMITS = ('CPU', 'FSIZE', 'DATA', 'STACK', 'CORE', 'RSS', 'NPROC', 'NOFILE', 'MEMLOCK', 'AS', 'LOCKS', 'SIGPENDING',
           'MSGQUEUE', 'NICE', 'RTPRIO', 'RTTIME')
_RESOURCE = 'run ckptd with CAP_SYS_RESOURCE, or with limits as high (ulimit -H, systemd: Limit{}=)'
_AS_ROOT = 'restore it as root'
_NICE_HINT = 'run ckptd with CAP_SYS_NICE'


def check(context: CheckContext) -> Iterator[Finding]:
    for process in context.plan.processes:
        if process.alive:
            yield from _limits(context, process.vpid)
            yield from _oom(context, process.vpid)
            yield from _locked(context, process.vpid, process.ids.mm_id)
            yield from _timers(context, process.vpid)
    yield from _lowest(context)
    for process in context.plan.processes:
        yield from once(row for task in process.alive for row in _scheduling(context, task.vpid, process.vpid))


def _limits(context: CheckContext, vpid: int) -> Iterator[Finding]:
    wanted = context.reader.get(Limits, vpid).limits
    for name, limit, nearest in zip(_LIMITS, wanted, context.allowed.limits(vpid), strict=False):
        if limit == nearest:
            continue
        reason, comes = f'its hard limit RLIMIT_{name} is {_amount(limit.hard)}', f'with {_amount(nearest.hard)}'
        if name == _LIMITS[NOFILE] and limit.hard > nr_open() == nearest.hard:
            yield context.beyond(about(vpid, 'RLIMIT_NOFILE', 'EPERM', f'{reason}, and this machine has at most '
                                       f'{nr_open()}', 'raise the sysctl fs.nr_open'), comes)
        else:
            yield context.beyond(about(vpid, f'RLIMIT_{name}', 'EPERM', f'{reason}, ours {_amount(nearest.hard)}',
                                       _RESOURCE.format(name)), comes)


def _amount(value: int) -> str:
    return 'unlimited' if value == INFINITY else f'{value:,}'


def _oom(context: CheckContext, vpid: int) -> Iterator[Finding]:
    wanted, nearest = context.reader.get(ProcessState, vpid).oom_score_adj - 1000, context.allowed.oom_score_adj(vpid)
    if wanted != nearest:
        yield context.beyond(about(vpid, 'oom_score_adj', 'EACCES', f'its oom_score_adj is {wanted}, ours '
                                   f'{read_oom_score_adj(os.getpid())}, and lowering it takes a privilege',
                                   'run ckptd with CAP_SYS_RESOURCE (systemd: OOMScoreAdjust=)'), f'with {nearest}')


def _locked(context: CheckContext, vpid: int, mm_id: int) -> Iterator[Finding]:
    vmas = [vma for vma in context.reader.memory(mm_id).vmas if vma.locked]
    if unlocked := sum(vma.end - vma.start for vma in vmas if vma.start not in context.allowed.locked(vpid, vmas)):
        locked = sum(vma.end - vma.start for vma in vmas)
        limit = context.allowed.limits(vpid)[MEMLOCK].soft
        yield context.beyond(about(vpid, 'locked memory', 'EPERM', f'has {locked:,} bytes of memory locked, and may '
                                   f'lock {limit:,}', 'run ckptd with CAP_IPC_LOCK'),
                             f'with {locked - unlocked:,} bytes locked')


def _timers(context: CheckContext, vpid: int) -> Iterator[Finding]:
    for timer in context.reader.get(PosixTimers, vpid).timers:
        if timer.clock in ALARM_CLOCKS and not context.lookup.capable(CAP_WAKE_ALARM):
            yield about(vpid, f'timer {timer.id}', 'EPERM', f'its timer of {ALARM_CLOCKS[timer.clock]} wakes a '
                        'suspended machine, which takes CAP_WAKE_ALARM', _AS_ROOT)


def _lowest(context: CheckContext) -> Iterator[Finding]:
    """Mappings at addresses that the kernel keeps from users: a bug of its own that follows a null pointer would find
    what they have put there (security/commoncap.c, cap_mmap_addr)."""
    least, users = int(read_file('/proc/sys/vm/mmap_min_addr')), context.plan.users('mm_id')
    for vma in context.reader.every(Vma):
        if vma.start < least and vma.mm_id in users and not context.lookup.capable(CAP_SYS_RAWIO):
            yield about(users[vma.mm_id], f'vma {vma.start:x}-{vma.end:x}', 'EPERM', 'is mapped below address '
                        f'{least:#x} (sysctl vm.mmap_min_addr), which takes CAP_SYS_RAWIO', _AS_ROOT)


# ---------------------------------------------------------------- scheduling

def _scheduling(context: CheckContext, vpid: int, leader: int) -> Iterator[Finding]:
    record, nearest = context.reader.get(Scheduling, vpid), context.allowed.scheduling(vpid, leader)
    for what, comes in _privileged(record, nearest):
        yield context.beyond(about(vpid, 'scheduling', 'EPERM', f'{what}, which takes a privilege', _NICE_HINT),
                             comes)
    if record.ioprio != nearest.ioprio and record.ioprio >> IOPRIO_CLASS_SHIFT == IOPRIO_CLASS_RT:
        yield context.beyond(about(vpid, 'I/O priority', 'EPERM', 'its I/O is of the real-time class, which takes a '
                                   'privilege', _NICE_HINT), 'with the best-effort class')
    allowed = {cpu for cpu in range(len(record.affinity) * 8) if record.affinity[cpu // 8] >> cpu % 8 & 1}
    if missing := sorted(allowed - os.sched_getaffinity(0)):
        yield about(vpid, 'processors', 'EINVAL', f'ran on processors {_ranges(missing)} too, which are not there '
                    'or not ours', 'it runs on the others', 'warning')


def _privileged(record: Scheduling, nearest: Scheduling) -> Iterator[tuple[str, str]]:
    """Pairs of what is not allowed and of what the task gets instead."""
    ordinary = 'with the policy SCHED_OTHER'
    if record.policy == SCHED_DEADLINE != nearest.policy:
        yield 'its policy is SCHED_DEADLINE', ordinary
    elif record.policy in REAL_TIME and (record.policy, record.priority) != (nearest.policy, nearest.priority):
        yield (f'has real-time priority {record.priority}',
               ordinary if nearest.policy != record.policy else f'with priority {nearest.priority}')
    if record.nice != nearest.nice:
        yield (f'its nice value is {record.nice - 20}, ours {os.getpriority(os.PRIO_PROCESS, 0)}',
               f'with {nearest.nice - 20}')
    if record.flags != nearest.flags:
        yield 'has no SCHED_RESET_ON_FORK, as ckptd has', 'with it'


def _ranges(numbers: list[int]) -> str:
    """'2-5, 9'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ', '.join('-'.join(map(str, run)) for run in runs)

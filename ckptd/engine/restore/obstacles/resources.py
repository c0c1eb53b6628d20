# SPDX-License-Identifier: LGPL-2.1-or-later
"""What takes a privilege of ours to be set again: hard limits, oom_score_adj, scheduling, locked memory."""

import os
import resource
from collections.abc import Iterator

from ckptd.engine.restore.obstacles.scene import Obstacle, Scene, once
from ckptd.image.records import Limits, PosixTimers, ProcessState, Scheduling, Vma
from ckptd.kernel.creds import CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_RAWIO, CAP_SYS_RESOURCE, CAP_WAKE_ALARM
from ckptd.kernel.procfs import read_file
from ckptd.kernel.task import read_oom_score_adj
from ckptd.kernel.timerfd import ALARM_CLOCKS

CAP_IPC_LOCK = 14           # <linux/capability.h>
# <asm-generic/resource.h>, by number
LIMITS = ('CPU', 'FSIZE', 'DATA', 'STACK', 'CORE', 'RSS', 'NPROC', 'NOFILE', 'MEMLOCK', 'AS', 'LOCKS', 'SIGPENDING',
          'MSGQUEUE', 'NICE', 'RTPRIO', 'RTTIME')
_NOFILE, MEMLOCK, _NICE, _RTPRIO = 7, 8, 13, 14
_INFINITY = (1 << 64) - 1
# <linux/sched.h>
SCHED_DEADLINE, SCHED_FLAG_RESET_ON_FORK = 6, 1
REAL_TIME = (os.SCHED_FIFO, os.SCHED_RR)
_IOPRIO_CLASS_SHIFT, _IOPRIO_CLASS_RT = 13, 1       # <linux/ioprio.h>
_RESOURCE = 'run ckptd with CAP_SYS_RESOURCE, or with limits as high (ulimit -H, systemd: Limit{}=)'
_AS_ROOT = 'restore it as root'
_NICE_HINT = 'run ckptd with CAP_SYS_NICE'


def check(scene: Scene) -> Iterator[Obstacle]:
    for process in scene.plan.processes:
        if process.alive:
            yield from _limits(scene, process.vpid)
            yield from _oom(scene, process.vpid)
            yield from _locked(scene, process.vpid, process.ids.mm_id)
            yield from _timers(scene, process.vpid)
    yield from _lowest(scene)
    for process in scene.plan.processes:
        yield from once(row for task in process.alive for row in _scheduling(scene, task.vpid, process.vpid))


def _limits(scene: Scene, vpid: int) -> Iterator[Obstacle]:
    for number, limit in enumerate(scene.reader.get(Limits, vpid).limits[:len(LIMITS)]):
        name, hard = LIMITS[number], _hard(scene, number)
        if limit.hard > hard and not scene.may(CAP_SYS_RESOURCE):
            yield Obstacle(vpid, f'RLIMIT_{name}', 'EPERM', f'its hard limit RLIMIT_{name} is {_amount(limit.hard)}, '
                           f'ours {_amount(hard)}', _RESOURCE.format(name))
        if number == _NOFILE and limit.hard > (most := _number('/proc/sys/fs/nr_open')):
            # kernel/sys.c, do_prlimit
            yield Obstacle(vpid, 'RLIMIT_NOFILE', 'EPERM', f'its hard limit RLIMIT_NOFILE is {_amount(limit.hard)}, '
                           f'and this machine has at most {most}', 'raise the sysctl fs.nr_open')


def _hard(scene: Scene, number: int) -> int:
    """The highest hard limit that the tree may have without a privilege."""
    own, asked = _unsigned(resource.getrlimit(number)[1]), scene.request.hard_limits
    return min(own, asked[number]) if number < len(asked) else own


def _unsigned(value: int) -> int:
    return _INFINITY if value == resource.RLIM_INFINITY else value


def _amount(value: int) -> str:
    return 'unlimited' if value == _INFINITY else f'{value:,}'


def _number(path: str) -> int:
    return int(read_file(path))


def _oom(scene: Scene, vpid: int) -> Iterator[Obstacle]:
    wanted, own = scene.reader.get(ProcessState, vpid).oom_score_adj - 1000, read_oom_score_adj(os.getpid())
    if wanted < own and not scene.may(CAP_SYS_RESOURCE) and not _can_lower_oom_score_adj(wanted):
        yield Obstacle(vpid, 'oom_score_adj', 'EACCES', f'its oom_score_adj is {wanted}, ours {own}, and lowering it '
                       'takes a privilege', 'run ckptd with CAP_SYS_RESOURCE (systemd: OOMScoreAdjust=)')


def _can_lower_oom_score_adj(value: int) -> bool:
    """Down to what it was last set to with the right to do so, which is nowhere to be read (fs/proc/base.c,
    oom_score_adj_min): so it is tried, and set back."""
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


def locked_bytes(scene: Scene, mm_id: int) -> int:
    """Of an address space, in memory that is locked."""
    return sum(vma.end - vma.start for vma in scene.reader.memory(mm_id).vmas if vma.locked)


def has_real_time_io(record: Scheduling) -> bool:
    return record.ioprio >> _IOPRIO_CLASS_SHIFT == _IOPRIO_CLASS_RT


def _locked(scene: Scene, vpid: int, mm_id: int) -> Iterator[Obstacle]:
    locked = locked_bytes(scene, mm_id)
    limit = scene.reader.get(Limits, vpid).limits[MEMLOCK].soft
    if locked > limit and not scene.may(CAP_IPC_LOCK):
        yield Obstacle(vpid, 'locked memory', 'EPERM', f'has {locked:,} bytes of memory locked, and may lock {limit:,}',
                       'run ckptd with CAP_IPC_LOCK')


def _timers(scene: Scene, vpid: int) -> Iterator[Obstacle]:
    for timer in scene.reader.get(PosixTimers, vpid).timers:
        if timer.clock in ALARM_CLOCKS and not scene.looking.capable(CAP_WAKE_ALARM):
            yield Obstacle(vpid, f'timer {timer.id}', 'EPERM', f'its timer of {ALARM_CLOCKS[timer.clock]} wakes a '
                           'suspended machine, which takes CAP_WAKE_ALARM', _AS_ROOT)


def _lowest(scene: Scene) -> Iterator[Obstacle]:
    """Mappings at addresses that the kernel keeps from users: a bug of its own that follows a null pointer would find
    what they have put there (security/commoncap.c, cap_mmap_addr)."""
    least, users = _number('/proc/sys/vm/mmap_min_addr'), scene.plan.users('mm_id')
    for vma in scene.reader.every(Vma):
        if vma.start < least and vma.mm_id in users and not scene.looking.capable(CAP_SYS_RAWIO):
            yield Obstacle(users[vma.mm_id], f'vma {vma.start:x}-{vma.end:x}', 'EPERM', 'is mapped below address '
                           f'{least:#x} (sysctl vm.mmap_min_addr), which takes CAP_SYS_RAWIO', _AS_ROOT)


# ---------------------------------------------------------------- scheduling

def _scheduling(scene: Scene, vpid: int, leader: int) -> Iterator[Obstacle]:
    record = scene.reader.get(Scheduling, vpid)
    if not scene.may(CAP_SYS_NICE):
        limits = scene.reader.get(Limits, leader).limits
        for what in _privileged(record, limits[_NICE].soft, limits[_RTPRIO].soft):
            yield Obstacle(vpid, 'scheduling', 'EPERM', f'{what}, which takes a privilege', _NICE_HINT)
        if has_real_time_io(record) and not scene.may(CAP_SYS_ADMIN):
            yield Obstacle(vpid, 'I/O priority', 'EPERM', 'its I/O is of the real-time class, which takes a privilege',
                           _NICE_HINT)
    allowed = {cpu for cpu in range(len(record.affinity) * 8) if record.affinity[cpu // 8] >> cpu % 8 & 1}
    if missing := sorted(allowed - os.sched_getaffinity(0)):
        yield Obstacle(vpid, 'processors', 'EINVAL', f'ran on processors {_ranges(missing)} too, which are not there '
                       'or not ours', 'it runs on the others', 'warning')


def _privileged(record: Scheduling, rlimit_nice: int, rlimit_rtprio: int) -> Iterator[str]:
    """As kernel/sched/syscalls.c decides, user_check_sched_setscheduler() and can_nice(); the limits are those of the
    task itself, which it has by then."""
    nice, here, policy = record.nice - 20, os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)
    if record.policy == SCHED_DEADLINE:
        yield 'its policy is SCHED_DEADLINE'
    elif record.policy in REAL_TIME:
        other = record.policy != policy & ~os.SCHED_RESET_ON_FORK
        if (other and not rlimit_rtprio) or record.priority > rlimit_rtprio:
            yield f'has real-time priority {record.priority}'
    if nice < here and 20 - nice > rlimit_nice:
        yield f'its nice value is {nice}, ours {here}'
    if policy & os.SCHED_RESET_ON_FORK and not record.flags & SCHED_FLAG_RESET_ON_FORK:
        yield 'has no SCHED_RESET_ON_FORK, as ckptd has'


def _ranges(numbers: list[int]) -> str:
    """'2-5, 9'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ', '.join('-'.join(map(str, run)) for run in runs)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images that came in from outside: whatever they claim, a caller other than root gets nothing that he has not.

What ckptd wrote for a uid, its processes had; what somebody made up they may never have had: limits, priorities, other
securebits than his own or a smaller bounding set, which unsettles programs with set-user-ID.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from ckptd.engine.messages import Caller
from ckptd.engine.restore.obstacles.resources import (
    LIMITS,
    MEMLOCK,
    REAL_TIME,
    SCHED_DEADLINE,
    has_real_time_io,
    locked_bytes,
)
from ckptd.engine.restore.obstacles.scene import Obstacle, Scene, once
from ckptd.image.records import SYSV, Credentials, Limits, ProcessState, Scheduling, SharedMemory
from ckptd.kernel.pidfd import held
from ckptd.kernel.task import read_limits, read_oom_score_adj

_AS_ROOT = 'restore it as root'


class Bounds(NamedTuple):
    """What the calling process has. hard: limits by RLIMIT_* number."""
    hard: tuple[int, ...]
    oom_score_adj: int
    nice: int


def check(scene: Scene) -> Iterator[Obstacle]:
    caller, manifest = scene.request.caller, scene.reader.manifest
    if not manifest.imported or scene.plan.world.user:
        return
    # root's rights in it would be of the importer's invention; with a broker root restores it as the importer
    if caller.uid != manifest.owner_uid and not scene.request.brokered:
        yield Obstacle(0, 'image', 'EPERM', f'the image was imported by uid {manifest.owner_uid}, who alone may '
                       'restore it', 'restore it as that user, or import it yourself')
    if not caller.uid or not caller.pid or scene.request.brokered:
        return      # of a worker that is the user the kernel asks for every right, see resources.py and rights.py
    bounds = _read_bounds(caller)
    for process in scene.plan.processes:
        if process.alive:
            yield from _process(scene, process.vpid, process.ids.mm_id, bounds)
            yield from once(row for task in process.alive for row in _task(scene, task.vpid, bounds))
    for record in scene.reader.every(SharedMemory):
        if record.kind == SYSV and (record.uid, record.gid) != (caller.uid, caller.gid):
            yield Obstacle(0, f'shmid {record.shmid}', 'EPERM', 'its System V segment is of another user', _AS_ROOT)


def _read_bounds(caller: Caller) -> Bounds | None:
    """None when the caller is gone."""
    pid = caller.pid
    try:
        with held(pid, caller.start_time, caller.uid):
            return Bounds(tuple(hard for _, hard in read_limits(pid)), read_oom_score_adj(pid),
                          os.getpriority(os.PRIO_PROCESS, pid))
    except (ProcessLookupError, FileNotFoundError):
        return None


def _process(scene: Scene, vpid: int, mm_id: int, bounds: Bounds | None) -> Iterator[Obstacle]:
    if bounds is None:
        yield Obstacle(vpid, 'limits', 'ESRCH', 'whoever asks is gone, whose limits would hold',
                       'ask again, and stay until there is an answer')
        return
    for number, limit in enumerate(scene.reader.get(Limits, vpid).limits[:len(LIMITS)]):
        if limit.hard > bounds.hard[number]:
            name = f'RLIMIT_{LIMITS[number]}'
            yield Obstacle(vpid, name, 'EPERM', f'its hard limit {name} is above that of the caller', _AS_ROOT)
    if scene.reader.get(ProcessState, vpid).oom_score_adj - 1000 < bounds.oom_score_adj:
        yield Obstacle(vpid, 'oom_score_adj', 'EPERM', 'its oom_score_adj is below that of the caller', _AS_ROOT)
    if (locked := locked_bytes(scene, mm_id)) > bounds.hard[MEMLOCK]:
        yield Obstacle(vpid, 'locked memory', 'EPERM', f'has {locked:,} bytes of memory locked, more than the caller '
                       'may', _AS_ROOT)


def _task(scene: Scene, vpid: int, bounds: Bounds | None) -> Iterator[Obstacle]:
    caller = scene.request.caller
    credentials, scheduling = scene.reader.get(Credentials, vpid), scene.reader.get(Scheduling, vpid)
    if credentials.securebits:
        yield Obstacle(vpid, 'securebits', 'EPERM', f'has securebits {credentials.securebits:#x}', _AS_ROOT)
    if credentials.capabilities[3] != caller.bounding:
        yield Obstacle(vpid, 'capabilities', 'EPERM', 'has another bounding set than the caller', _AS_ROOT)
    nice = bounds.nice if bounds else 19
    if (scheduling.policy in (*REAL_TIME, SCHED_DEADLINE) or scheduling.nice - 20 < nice
            or has_real_time_io(scheduling)):
        yield Obstacle(vpid, 'scheduling', 'EPERM', 'has a higher priority than the caller', _AS_ROOT)

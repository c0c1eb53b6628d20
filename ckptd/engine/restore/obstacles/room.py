# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether there is room for the tree: memory for its pages, numbers for its tasks."""

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ckptd.engine.restore.obstacles.scene import Obstacle, Scene
from ckptd.image.reader import ImageReader
from ckptd.image.records import PAGE, PageRuns, Vma
from ckptd.kernel.cgroup import Cgroup
from ckptd.kernel.creds import CAP_SYS_ADMIN, CAP_SYS_RESOURCE
from ckptd.kernel.procfs import read_file
from ckptd.kernel.task import pids

_STRICT = 2                 # vm.overcommit_memory: what is reserved counts, proc_sys_vm(5)
_SEED = 1                   # the first stub, which makes all others and ends


def check(scene: Scene) -> Iterator[Obstacle]:
    yield from _memory(scene)
    yield from _tasks(scene)


# ---------------------------------------------------------------- memory

def bytes_to_read(reader: ImageReader) -> int:
    """Bytes of pages, those once that several address spaces share. What is only reserved has none."""
    ranges = sorted((run.part, run.offset, run.offset + run.pages * PAGE) for chunk in reader.every(PageRuns)
                    for run in chunk.runs)
    total, last, done = 0, -1, 0
    for part, start, end in ranges:
        done = done if part == last else 0
        total += max(0, end - max(start, done))
        last, done = part, max(end, done)
    return total


def parse_meminfo(data: bytes) -> dict[str, int]:
    """Bytes by name of /proc/meminfo, proc_meminfo(5)."""
    found = {}
    for line in data.decode().splitlines():
        name, _, value = line.partition(':')
        number, *unit = value.split()
        found[name] = int(number) * (1024 if unit == ['kB'] else 1)
    return found


def _memory(scene: Scene) -> Iterator[Obstacle]:
    needed, info = bytes_to_read(scene.reader), parse_meminfo(read_file('/proc/meminfo'))
    free, swap = info['MemAvailable'], info['SwapFree']
    if needed > free + swap:
        yield Obstacle(0, 'memory', 'ENOMEM', f'the tree has {needed:,} bytes of memory, and {free + swap:,} are left, '
                       'swap included', 'free memory, or add swap')
    elif needed > free:
        yield Obstacle(0, 'memory', 'ENOMEM', f'the tree has {needed:,} bytes of memory, and without swapping {free:,} '
                       'are left', 'free memory, or it is going to be slow', 'warning')
    if _number('/proc/sys/vm/overcommit_memory') == _STRICT:
        reserved = sum(vma.end - vma.start for vma in scene.reader.every(Vma) if 'ac' in vma.vm_flags.split())
        if reserved > (left := info['CommitLimit'] - info['Committed_AS']):
            yield Obstacle(0, 'memory', 'ENOMEM', f'the tree reserves {reserved:,} bytes, and {left:,} may be reserved',
                           'set the sysctl vm.overcommit_memory to 0, or add swap')
    for group in _above(scene.home):
        limit, used = _limit(group, 'memory.max'), _used(group)
        if limit is not None and needed > limit - used:
            yield Obstacle(0, 'memory', 'ENOMEM', f'the tree has {needed:,} bytes of memory, and the cgroup '
                           f'{group.name} has {max(limit - used, 0):,} left', 'raise its memory.max (systemd: '
                           'MemoryMax=), or restore with another --cgroup')


def _used(group: Cgroup) -> int:
    """Bytes that are charged to a cgroup, less the page cache that it gives back."""
    with suppress(OSError):
        stat = dict(line.split() for line in read_file(f'{group.path}/memory.stat').decode().splitlines())
        return _number(f'{group.path}/memory.current') - int(stat['active_file']) - int(stat['inactive_file'])
    return 0


def _number(path: str) -> int:
    return int(read_file(path))


def _limit(group: Cgroup, file: str) -> int | None:
    """None where there is none, or no such controller."""
    with suppress(OSError, ValueError):     # 'max' is no number
        return _number(f'{group.path}/{file}')
    return None


def _above(home: str) -> list[Cgroup]:
    """A cgroup and all above it; without those that are yet to be made."""
    with suppress(FileNotFoundError):
        group: Cgroup | None = Cgroup.named(home)
        found = []
        while group is not None:
            found += [group] if group.exists else []
            group = group.parent or (Cgroup(group.path.parent) if not group.exists else None)
        return found
    return []


# ---------------------------------------------------------------- tasks

def _tasks(scene: Scene) -> Iterator[Obstacle]:
    needed = max(len(scene.plan.tasks), len(scene.plan.numbers)) + _SEED
    running = int(read_file('/proc/loadavg').split()[3].partition(b'/')[2])
    for name in ('threads-max', 'pid_max'):
        most = _number(f'/proc/sys/kernel/{name}')
        if running + needed > most:
            yield Obstacle(0, 'tasks', 'EAGAIN', f'{needed:,} more tasks are needed, {running:,} run and {most:,} may',
                           f'raise the sysctl kernel.{name}')
    yield from _numbers(scene.plan.numbers)
    for group in _above(scene.home):
        limit = _limit(group, 'pids.max')
        if limit is not None and needed > (left := limit - (_limit(group, 'pids.current') or 0)):
            yield Obstacle(0, 'tasks', 'EAGAIN', f'{needed:,} more tasks are needed, and the cgroup {group.name} takes '
                           f'{max(left, 0):,}', 'raise its pids.max (systemd: TasksMax=), or restore with another '
                           '--cgroup')
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if os.getuid() and soft != resource.RLIM_INFINITY and not (scene.may(CAP_SYS_RESOURCE) or scene.may(CAP_SYS_ADMIN)):
        own = _own_tasks()
        if own + needed > soft:
            yield Obstacle(0, 'RLIMIT_NPROC', 'EAGAIN', f'{needed:,} more tasks are needed, uid {os.getuid()} has '
                           f'{own:,} and may have {soft:,}', 'raise the limit (ulimit -u)')


def _numbers(numbers: Iterable[int]) -> Iterator[Obstacle]:
    """A number that a task is to get must be below pid_max (kernel/pid.c, alloc_pid)."""
    most, highest = _number('/proc/sys/kernel/pid_max'), max(numbers, default=0)
    if highest >= most:
        yield Obstacle(highest, f'pid {highest}', 'EINVAL', f'this machine has numbers below {most:,} only',
                       f'raise the sysctl kernel.pid_max above {highest}')


def _own_tasks() -> int:
    count = 0
    for pid in pids():
        with suppress(OSError):
            if os.stat(f'/proc/{pid}').st_uid == os.getuid():  # noqa: PTH116
                count += os.stat(f'/proc/{pid}/task').st_nlink - 2  # noqa: PTH116
    return count

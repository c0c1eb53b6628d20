# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time namespaces (time_namespaces(7)): CLOCK_MONOTONIC and CLOCK_BOOTTIME as a task sees them."""

import functools
import os
import time
from typing import NamedTuple

from ckptd.kernel.decl import c_int, libc
from ckptd.kernel.procfs import read_task_file, task_dir
from ckptd.kernel.task import read_namespaces


class Offsets(NamedTuple):
    """Nanoseconds that a namespace adds to the clocks of the initial one; may be negative."""
    monotonic: int = 0
    boottime: int = 0


def read_offsets(pid: int) -> Offsets:
    """Read the offsets of a task's own namespace; zero where the kernel has none (CONFIG_TIME_NS)."""
    links = read_namespaces(pid)
    # The file has the offsets of the namespace for the task's children. If that is another one, the task has called
    # unshare(2) itself, and its own namespace is the one that it was born in.
    if links.get('time') != links.get('time_for_children'):
        return Offsets() if pid == os.getpid() else read_offsets(os.getpid())
    try:
        return parse_offsets(read_task_file(task_dir(pid), 'timens_offsets'))
    except FileNotFoundError:
        return Offsets()


@functools.cache
def _own_offsets() -> Offsets:
    return read_offsets(os.getpid())


def host_monotonic_ns() -> int:
    """Return CLOCK_MONOTONIC of the initial namespace, which the kernel uses internally."""
    return time.monotonic_ns() - _own_offsets().monotonic


def parse_offsets(data: bytes) -> Offsets:
    """Parse lines of a clock's name, seconds and nanoseconds: b'monotonic          0         0'."""
    rows = {name: int(seconds) * 10**9 + int(nanoseconds)
            for name, seconds, nanoseconds in (line.split() for line in data.splitlines())}
    return Offsets(rows.get(b'monotonic', 0), rows.get(b'boottime', 0))


@libc
def unshare(flags: c_int) -> c_int:
    """Leave shared namespaces. For a time namespace, children are then born in the new one."""


@libc
def setns(fd: c_int, nstype: c_int) -> c_int:
    """Enter the namespace of an fd. Only a process of one thread may enter a time namespace (setns(2))."""


def write_offsets(offsets: Offsets, pid: int | str = 'self') -> None:
    """Set the clocks of the namespace for the children of a process, while that namespace is empty. OSError."""
    lines = [f'{name} {offset // 10**9} {offset % 10**9}'
             for name, offset in zip(('monotonic', 'boottime'), offsets, strict=True)]
    fd = os.open(f'/proc/{pid}/timens_offsets', os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, '\n'.join(lines).encode())
    finally:
        os.close(fd)


class ClockReadings(NamedTuple):
    """The clocks of a task at one moment, in nanoseconds. host: by CLOCK_*, as in the initial namespace."""
    monotonic: int
    boottime: int
    monotonic_offset: int
    boottime_offset: int
    host: dict[int, int]

    @classmethod
    def read(cls, pid: int) -> 'ClockReadings':
        """Read the clocks of task `pid` now."""
        its, ours = read_offsets(pid), read_offsets(os.getpid())
        host = {clock: time.clock_gettime_ns(clock) for clock in
                (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_TAI)}
        host[time.CLOCK_MONOTONIC] -= ours.monotonic
        host[time.CLOCK_BOOTTIME] -= ours.boottime
        return cls(host[time.CLOCK_MONOTONIC] + its.monotonic, host[time.CLOCK_BOOTTIME] + its.boottime, *its, host)

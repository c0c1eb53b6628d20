# SPDX-License-Identifier: LGPL-2.1-or-later
"""The system call that a task is blocked in (/proc/PID/syscall), and since when (/proc/PID/sched)."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptd.kernel.procfs import read_task_file, task_dir
from ckptd.kernel.timens import host_monotonic_ns


class BlockedCall(NamedTuple):
    """A system call: number and six arguments, as in the registers."""
    number: int
    arguments: tuple[int, ...]


def read_call(pid: int, tid: int) -> BlockedCall | None:
    """Read the blocked call. None for a task that runs, is blocked outside of a system call, or hides its registers."""
    try:
        return parse_call(read_task_file(task_dir(pid, tid), 'syscall'))
    except (FileNotFoundError, PermissionError):
        return None


def parse_call(data: bytes) -> BlockedCall | None:
    """Parse '230 0x0 0x0 0x7ffedff09a10 0x7ffedff09a50 0x0 0x0 0x7ffedff099f8 0x7ffbb39c3503', 'running' or '-1 SP
    IP'."""
    fields = data.split()
    if len(fields) != 9:
        return None
    return BlockedCall(int(fields[0]), tuple(int(field, 16) for field in fields[1:7]))


class LastRun(NamedTuple):
    """The time when the scheduler last counted time for a task; for a sleeping task, when it went to sleep.

    It is in nanoseconds of the CPU's own clock, which stops during interrupts and while a hypervisor runs others
    (kernel/sched/core.c, update_rq_clock_task).
    """
    cpu: int
    at: int


def read_last_run(pid: int, tid: int) -> LastRun | None:
    """Read the last run. None on a kernel without CONFIG_SCHED_DEBUG (< 6.15)."""
    try:
        sched, stat = (read_task_file(task_dir(pid, tid), name) for name in ('sched', 'stat'))
    except FileNotFoundError:
        return None
    return LastRun(int(stat[stat.rindex(b')') + 2:].split()[36]), parse_exec_start(sched))


def parse_exec_start(data: bytes) -> int:
    """Parse the row 'se.exec_start    :    1122093.902481' of milliseconds into nanoseconds."""
    value = next(line for line in data.split(b'\n') if line.startswith(b'se.exec_start')).rpartition(b':')[2]
    whole, _, fraction = value.strip().partition(b'.')
    return int(whole) * 10**6 + int(fraction)


@contextmanager
def cpu_clocks() -> Iterator['CpuClocks']:
    """Provide readings of the CPUs' clocks. Meanwhile this thread moves between CPUs."""
    affinity = os.sched_getaffinity(0)
    try:
        yield CpuClocks()
    finally:
        os.sched_setaffinity(0, affinity)


class CpuClocks:
    """The distance of each CPU's clock behind CLOCK_MONOTONIC of the initial time namespace. Each is read once."""

    def __init__(self) -> None:
        self._behind: dict[int, int | None] = {}

    def monotonic(self, run: LastRun) -> int | None:
        """Convert a time to CLOCK_MONOTONIC. The result may be too late by the time that the CPU has since spent in
        interrupts or not running, and is never too early. None if this process may not run on that CPU."""
        if run.cpu not in self._behind:
            self._behind[run.cpu] = self._read(run.cpu)
        behind = self._behind[run.cpu]
        return None if behind is None else run.at + behind

    @staticmethod
    def _read(cpu: int) -> int | None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError:
            return None
        os.sched_yield()        # this updates the kernel's count of our own time
        own = read_last_run(os.getpid(), threading.get_native_id())
        return None if own is None or own.cpu != cpu else host_monotonic_ns() - own.at

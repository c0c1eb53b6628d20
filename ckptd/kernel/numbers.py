# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pids in use and their users. A session or group also takes the pid that it is named by."""

import os
import select
import time
from collections.abc import Collection
from contextlib import suppress

from ckptd.kernel.pidfd import pidfd_open
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import pids, read_threads

Numbers = dict[int, str]
_LOOK_AGAIN = 0.05      # seconds: before 6.9 a pidfd does not report when its process is reaped


def numbers_in_use() -> Numbers:
    """Return the user of each pid, such as 'bash[100]': processes, threads, and groups and sessions that outlive their
    leaders. For a process that is listed but cannot be read (hidepid=1 of proc(5)), only its pid is known."""
    found: Numbers = {}
    led: Numbers = {}
    for pid in pids():
        try:
            stat = read_stat(pid)
            name = f'{stat.comm}[{pid}]'
            # a leader may have ended before its threads
            dead = f', dead: its parent, process {stat.ppid}, has not waited for it'
            found |= dict.fromkeys(read_threads(pid), name + dead * (stat.state in 'ZX' and stat.num_threads <= 1))
            for number, what in ((stat.pgrp, 'group'), (stat.session, 'session')):
                led.setdefault(number, f'{name}, whose {what} it is')
        except PermissionError:
            found[pid] = f'process {pid}'
        except ProcessLookupError:
            continue
    led.pop(0, None)
    return led | found


def await_reaped(numbers: Collection[int], deadline: float) -> None:
    """Wait until dead processes that use one of these pids, or a group or session named by one, are reaped. The first
    process of a small machine does that only every second or two. deadline: of time.monotonic()."""
    for pid in pids():
        with suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < deadline and _is_in_the_way(pid, numbers):
                _await_reaped(pid)


def _is_in_the_way(pid: int, numbers: Collection[int]) -> bool:
    stat = read_stat(pid)
    return stat.state in 'ZX' and not {pid, stat.pgrp, stat.session}.isdisjoint(numbers)


def _await_reaped(pid: int) -> None:
    fd = pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(fd, 0)        # POLLHUP: reaped; a zombie alone is POLLIN, which is not requested
        poll.poll(_LOOK_AGAIN * 1000)
    finally:
        os.close(fd)

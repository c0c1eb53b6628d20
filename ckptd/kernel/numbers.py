# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which pids are in use, and by whom: a number is also taken by a session or group that is named by it."""

import os
import select
import time
from collections.abc import Collection
from contextlib import suppress

from ckptd.kernel.pidfd import pidfd_open
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import pids, read_threads

Numbers = dict[int, str]
_LOOK_AGAIN = 0.05      # seconds: before 6.9 a pidfd does not tell when its process is reaped


def numbers_in_use() -> Numbers:
    """Name what has each number, 'bash[100]': processes, threads, and groups and sessions that outlive their leaders. A
    process that is listed and cannot be read (hidepid=1 of proc(5)) has its number alone."""
    found: Numbers = {}
    led: Numbers = {}
    for pid in pids():
        try:
            stat = read_stat(pid)
            name = f'{stat.comm}[{pid}]'
            found |= dict.fromkeys(read_threads(pid), name)
            for number, what in ((stat.pgrp, 'group'), (stat.session, 'session')):
                led.setdefault(number, f'{name}, whose {what} it is')
        except PermissionError:
            found[pid] = f'process {pid}'
        except ProcessLookupError:
            continue
    led.pop(0, None)
    return led | found


def await_reaped(numbers: Collection[int], deadline: float) -> None:
    """Wait for dead processes that have one of these numbers, or a group or session named by one, to be reaped: the
    first process of a small machine does so every second or two only. deadline: of time.monotonic()."""
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
        poll.register(fd, 0)        # POLLHUP: reaped; a zombie alone is POLLIN, which nobody asked for
        poll.poll(_LOOK_AGAIN * 1000)
    finally:
        os.close(fd)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descent of processes, by the parents in /proc/PID/stat."""

from ckptd.kernel.stat import Stat, read_stat

_MAX_DEPTH = 1 << 16


def is_below(pid: int, ancestor: int, start_time: int) -> bool:
    """Whether a process is `ancestor`, which began at start_time, or descends from it.

    The files are read one after the other, and a pid may be reused in between. So all is read twice: a parent that has
    ended meanwhile is no longer a parent, and a new process with its pid has a later start time.
    """
    try:
        line = _line(pid, ancestor)
        return bool(line) and line[-1].start_time == start_time and all(_is_as_before(one) for one in line)
    except ProcessLookupError:
        return False


def _line(pid: int, ancestor: int) -> list[Stat]:
    """Return the stat lines from the process up to the ancestor; empty if the ancestor is not above it."""
    line = [read_stat(pid)]
    while line[-1].pid != ancestor:
        if line[-1].ppid <= 0 or len(line) > _MAX_DEPTH:
            return []
        line.append(read_stat(line[-1].ppid))
    return line


def _is_as_before(stat: Stat) -> bool:
    now = read_stat(stat.pid)
    return (now.start_time, now.ppid) == (stat.start_time, stat.ppid)

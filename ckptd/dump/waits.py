# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notes, made before a stop, of when waits began that the stop ends.

    notes = note_waits(tree)                    just before the freeze
    waits = issue_again(tracees, notes)         see resume.py: those whose calls are issued again

epoll_wait(2) and the like have only the length of the wait. A restarted call begins again, and nothing in the stopped
task tells when it began. While it sleeps, its timer is in /proc/timer_list as a point in time. /proc/PID/sched has the
time when the scheduler put it to sleep, by a clock that is not quite accurate. The task's timer is the one whose end is
the timeout after that time, or shortly before. If the list is not readable, that time alone gives the end, less
precisely.
"""

import ctypes
import struct
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptd.image.records import SleepLeft
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.blocked import BlockedCall, cpu_clocks, read_call, read_last_run
from ckptd.kernel.memory import Mem
from ckptd.kernel.timer_list import End, read_sleeps
from ckptd.tree import Task

# system calls with a timeout that no kernel restarts: the register of the timeout, in milliseconds or as an address
_MILLISECONDS = {arch.NR['epoll_wait']: 'r10', arch.NR['epoll_pwait']: 'r10'}
_TIMESPEC = {arch.NR['rt_sigtimedwait']: 'rdx', arch.NR['io_getevents']: 'r8', arch.NR['semtimedop']: 'r10',
             arch.NR['io_pgetevents']: 'r8', arch.NR['epoll_pwait2']: 'r10'}
_NEVER_RESTARTED = {*_MILLISECONDS, *_TIMESPEC}
_RESTARTED = {arch.NR[name] for name in ('nanosleep', 'clock_nanosleep', 'poll', 'futex', 'restart_syscall')}
_ARGUMENTS = ('rdi', 'rsi', 'rdx', 'r10', 'r8', 'r9')
_EARLIER = 250_000_000      # ns that a CPU's clock may be behind because it stood still, plus a fraction of the time
_EARLIER_PART = 20
_LATER = 1_000_000          # ns between the two readings of a clock
_ALIKE = 10_000_000         # ns: of timers this close to each other any will do


@dataclass(frozen=True, slots=True)
class WaitNote:
    """A blocked thread. begun: CLOCK_MONOTONIC in nanoseconds; it may be too late, and is never too early."""
    call: BlockedCall
    begun: int


@dataclass(slots=True)
class WaitNotes:
    """Notes by tid. ends: of all timers, None if they are not readable."""
    notes: dict[int, WaitNote] = field(default_factory=dict)
    ends: Counter[End] | None = None

    def begun(self, tid: int, regs: arch.user_regs_struct) -> int | None:
        """Return when the call began in which the thread was stopped; None if unknown."""
        note = self.notes.get(tid)
        same = note and note.call == BlockedCall(regs.orig_rax, tuple(getattr(regs, name) for name in _ARGUMENTS))
        return note.begun if note and same else None


@dataclass(slots=True)
class Wait:
    """A call that is issued again."""
    number: int
    whole_ns: int
    end: int       # of CLOCK_MONOTONIC
    exact: bool    # to some milliseconds

    def milliseconds(self, now: int) -> int:
        """Return the remaining time, rounded up."""
        return min(max(0, -(-(self.end - now) // 10**6)), self.whole_ns // 10**6)

    def record(self, vpid: int, clocks: Mapping[int, int]) -> SleepLeft:
        left = min(max(0, self.end - clocks[time.CLOCK_MONOTONIC]), self.whole_ns)
        return SleepLeft(vpid, self.number, left, time.CLOCK_MONOTONIC, int(self.exact))


def note_waits(tasks: Iterable[Task]) -> WaitNotes:
    """Note the waits of living tasks. A task that dies or continues meanwhile is left out."""
    notes = WaitNotes()
    readable = _read_ends() is not None
    # the others have a restart block, which tells more if the list is readable (see sleeps.py)
    wanted = _NEVER_RESTARTED if readable else _NEVER_RESTARTED | _RESTARTED
    with cpu_clocks() as clocks:
        for task in tasks:
            try:
                call = read_call(task.tgid, task.tid)
                if call is None or call.number not in wanted:
                    continue
                run = read_last_run(task.tgid, task.tid)
            except ProcessLookupError:
                continue
            begun = clocks.monotonic(run) if run else None
            if begun is not None:
                notes.notes[task.tid] = WaitNote(call, begun)
    notes.ends = _read_ends() if notes.notes else None
    return notes


def _read_ends() -> Counter[End] | None:
    try:
        return read_sleeps()
    except (PermissionError, FileNotFoundError):
        return None


def timeout_of(tid: int, regs: arch.user_regs_struct) -> int | None:
    """Return the timeout in nanoseconds of a call that is never restarted; None if it has none."""
    number = regs.orig_rax
    if number in _MILLISECONDS:
        value = ctypes.c_int32(getattr(regs, _MILLISECONDS[number])).value
        return value * 10**6 if value >= 0 else None
    address = getattr(regs, _TIMESPEC.get(number, ''), 0)
    if not address:
        return None
    try:
        with Mem(tid) as mem:
            seconds, nanoseconds = struct.unpack('<2q', mem.read(address, 16))
    except OSError:
        return None
    return int(seconds * 10**9 + nanoseconds)


def wait_of(tid: int, regs: arch.user_regs_struct, notes: WaitNotes, now: int) -> Wait | None:
    """Return the wait of a stopped thread; None if it has no timeout. now: CLOCK_MONOTONIC. A wait without a note began
    after the notes, so its end is the latest possible."""
    whole, number = timeout_of(tid, regs), int(regs.orig_rax)
    if whole is None:
        return None
    begun = notes.begun(tid, regs)
    if begun is None:
        return Wait(number, whole, now + whole, exact=False)
    if notes.ends is None:
        return Wait(number, whole, begun + whole, exact=False)
    earliest = begun + whole - _EARLIER - (now - begun) // _EARLIER_PART
    latest = begun + whole + _LATER
    near = [end for end in notes.ends if end.clock == time.CLOCK_MONOTONIC and earliest <= end.at <= latest]
    if not near:
        return Wait(number, whole, begun + whole, exact=False)
    # the last of them: too long is better than too short
    last = max(end.at for end in near)
    return Wait(number, whole, last, exact=last - min(end.at for end in near) < _ALIKE)


def set_timeout(regs: arch.user_regs_struct, wait: Wait, now: int) -> None:
    """Set the argument of a call whose timeout is a register to the remaining time. A timeout in memory belongs to the
    program."""
    register = _MILLISECONDS.get(wait.number)
    if register:
        setattr(regs, register, wait.milliseconds(now))

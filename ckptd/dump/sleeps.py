# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find out how much time was left of interrupted sleeps.

A task that was stopped in nanosleep, clock_nanosleep, poll or a futex wait with a relative timeout has the end of the
sleep in its restart block, which no file shows. While it sleeps, its timer is in /proc/timer_list. So each such task
continues its sleep for a moment and is stopped again; the timer that the list has only meanwhile is its end. The task
continues as the kernel would do it, from one PTRACE_SYSCALL to the next. If its tracer dies in between, it simply
sleeps on. If its sleep ends, it stands at the exit of the call and has its result, in the original and in the image.

The list does not tell the owner of a timer. The tasks are numbered from 1, and in round k those sleep whose number has
bit k: the rounds in which a timer was present give the number of its task. A thousand sleeps take ten rounds.
"""

import ctypes
import os
import signal
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ckptd.dump.resume import has_signal
from ckptd.dump.waits import WaitNotes
from ckptd.faults import fault
from ckptd.image.records import ENDLESS, SleepLeft
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.memory import PAGE, Mem
from ckptd.kernel.ptrace import PTRACE_EVENT_STOP, PTRACE_O_TRACESYSGOOD, SYSCALL_STOP, Tracee
from ckptd.kernel.timer_list import End
from ckptd.kernel.wchan import read_wchan
from ckptd.operation.timers import Timers

_NR = arch.NR
_U32 = 2**32 - 1
_PATIENCE = 1.0             # seconds for tasks to come to rest; on a busy machine they have to wait for a CPU
_ATTEMPTS = 3               # for a single task, if timers of others came and went meanwhile
_FUTEX_COMMAND, _FUTEX_WAIT = 0x7F, 0       # <linux/futex.h>
# clocks of clock_nanosleep that use hrtimers. The kernel counts a relative CLOCK_REALTIME as CLOCK_MONOTONIC.
_HRTIMER_CLOCKS = (time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_TAI)
# registers with the address of a call's timeout, and of the remaining time that the kernel writes
_TIMEOUT = {_NR['nanosleep']: 'rdi', _NR['clock_nanosleep']: 'rdx', _NR['futex']: 'r10'}
_REMAINING = {_NR['nanosleep']: 'rsi', _NR['clock_nanosleep']: 'r10'}


@dataclass(slots=True)
class Sleep:
    """A thread with a restart block. end: None if unknown."""
    tracee: Tracee
    regs: arch.user_regs_struct
    number: int
    end: End | None = None

    @property
    def endless(self) -> bool:
        """Whether the sleep has no end, or one that its arguments contain as a point in time."""
        if self.number == _NR['poll']:
            return ctypes.c_int32(self.regs.rdx).value < 0
        return self.number == _NR['futex'] and self.regs.rsi & _FUTEX_COMMAND != _FUTEX_WAIT

    @property
    def clock(self) -> int:
        """The clock of the program's call."""
        return ctypes.c_int32(self.regs.rdi).value if self.number == _NR['clock_nanosleep'] else time.CLOCK_MONOTONIC

    @property
    def measurable(self) -> bool:
        return not self.endless and self.clock in _HRTIMER_CLOCKS


def find_sleeps(tracees: Mapping[int, Tracee], timers: 'Timers') -> dict[int, Sleep]:
    """Find the stopped threads that continue a sleep, by tid, with its end if that can be measured.

    A thread whose sleep ends meanwhile is left out, and has the result. The tree must not be frozen by a cgroup.
    ProcessLookupError if a thread dies.
    """
    sleeps = [Sleep(tracee, regs, _number(regs, '')) for tracee in tracees.values()
              if arch.in_restart_block(regs := tracee.regs)]
    # a thread with a signal to handle does not sleep on
    able = [sleep for sleep in sleeps if not has_signal(sleep.tracee)]
    try:
        _learn_numbers([sleep for sleep in able if sleep.regs.orig_rax == _NR['restart_syscall']])
        _Measurement([sleep for sleep in able if sleep.measurable], timers).run()
        if not able:
            fault('asleep-again')
    finally:
        left = [sleep for sleep in sleeps if sleep.tracee.attached and sleep.tracee.stopped
                and arch.in_restart_block(sleep.tracee.regs)]
        for sleep in left:
            sleep.tracee.regs = sleep.regs      # with the number of the call: it slept again in restart_syscall
    return {sleep.tracee.tid: sleep for sleep in left}


@contextmanager
def _asleep(sleeps: Sequence[Sleep]) -> Iterator[list[str]]:
    """Let the threads sleep during the block, then stop them again. Yield the kernel function that each sleeps in; ''
    for one that did not come to rest."""
    tracees = [sleep.tracee for sleep in sleeps]
    try:
        for tracee in tracees:
            tracee.set_options(PTRACE_O_TRACESYSGOOD)
            tracee.to_syscall()
        for tracee in tracees:
            _wait_syscall(tracee)       # the entry of restart_syscall
        for tracee in tracees:
            tracee.to_syscall()
        deadline = time.monotonic() + _PATIENCE
        yield [_wait_rest(tracee, deadline) for tracee in tracees]
    finally:
        with ExitStack() as stack:
            for tracee in tracees:
                if tracee.attached and not tracee.stopped:
                    stack.callback(_wait_syscall, tracee)
                    tracee.interrupt()


def _wait_syscall(tracee: Tracee) -> None:
    """Wait until it stands at the entry or the exit of a system call. A signal that is about to be delivered before the
    call has begun is kept for later, as in remote calls. One that comes later stays in its queue."""
    while (status := tracee.wait()) >> 8 != SYSCALL_STOP:
        sig = os.WSTOPSIG(status)
        if status >> 16 == PTRACE_EVENT_STOP:
            tracee.to_syscall()
        elif sig == signal.SIGSTOP:
            tracee.to_syscall(sig)      # the kernel must know of it, so that a SIGCONT that comes now cancels it
        else:
            tracee.deferred.append(sig)
            tracee.to_syscall()


def _wait_rest(tracee: Tracee, deadline: float) -> str:
    """Return the function that it sleeps in, once it sleeps: then its timer is armed, because wchan is empty while it
    may run. There is no event for that. A thread whose sleep is over is in ptrace_stop."""
    while not (function := read_wchan(tracee.tid)) and time.monotonic() < deadline:
        os.sched_yield()
    return function


def _learn_numbers(sleeps: Sequence[Sleep]) -> None:
    """Find the call numbers of sleeps that were interrupted before. All have the number of restart_syscall(2); only the
    function that they sleep in distinguishes them."""
    if sleeps:
        with _asleep(sleeps) as functions:
            for sleep, function in zip(sleeps, functions, strict=True):
                sleep.number = _number(sleep.regs, function)


def _number(regs: arch.user_regs_struct, function: str) -> int:
    """Return the number of the call that the program made. function: the kernel function that it sleeps in, '' if
    unknown."""
    number, first = regs.orig_rax, regs.rdi
    if number != _NR['restart_syscall']:
        return int(number)
    name = next((name for name in ('futex', 'poll') if name in function), 'nanosleep')
    # the first argument of nanosleep(2) is an address, that of clock_nanosleep(2) a clock, negative for CPU time
    negative = first >> 32 in (0, _U32) and -PAGE < ctypes.c_int32(first).value < 0
    if name == 'nanosleep' and (first < PAGE or negative):
        name = 'clock_nanosleep'
    return _NR[name]


class _Measurement:
    """A measurement of the ends of sleeps."""

    def __init__(self, sleeps: Sequence[Sleep], timers: Timers) -> None:
        self._sleeps, self._timers = sleeps, timers

    def run(self) -> None:
        """Set `end` of each sleep. Do nothing if the list is not readable, for an ordinary user without a broker."""
        if self._sleeps:
            try:
                self._timers.at_rest()
            except (PermissionError, FileNotFoundError):
                return
            self._find_all()
            for sleep in self._sleeps:
                if sleep.end is None:
                    self._find_one(sleep)

    def _find_all(self) -> None:
        numbers: dict[End, int] = defaultdict(int)
        for bit in range(len(self._sleeps).bit_length()):
            group = [sleep for number, sleep in enumerate(self._sleeps, 1) if number >> bit & 1]
            for end in self._ends_of(group):
                numbers[end] |= 1 << bit
        found: dict[int, list[End]] = defaultdict(list)
        for end, number in numbers.items():
            found[number].append(end)
        for number, sleep in enumerate(self._sleeps, 1):
            if len(found[number]) == 1:
                [sleep.end] = found[number]

    def _find_one(self, sleep: Sleep) -> None:
        """Measure one sleep alone, because two may end in the same nanosecond and other timers come and go."""
        ends = self._ends_of([sleep])
        for _ in range(_ATTEMPTS):
            if len(ends) == 1:
                [sleep.end] = ends
                return
            ends &= self._ends_of([sleep])

    def _ends_of(self, sleeps: Iterable[Sleep]) -> set[End]:
        """Return ends that are in the list while the sleeps run, and neither before nor after."""
        group = [sleep for sleep in sleeps if arch.in_restart_block(sleep.tracee.regs)]
        if not group:
            return set()
        with _asleep(group):
            fault('asleep-again')
            self._timers.asleep([sleep.tracee.tid for sleep in group])
        return self._timers.ends()


# ---------------------------------------------------------------- records

def sleep_left(sleep: Sleep, vpid: int, clocks: Mapping[int, int], notes: WaitNotes) -> SleepLeft:
    """Make the record. clocks: the value of each clock at the time of the dump, in nanoseconds."""
    clock = sleep.clock & _U32
    if sleep.endless:
        return SleepLeft(vpid, sleep.number, ENDLESS, clock, 1)
    if sleep.end is not None:
        return SleepLeft(vpid, sleep.number, max(0, sleep.end.at - clocks[sleep.end.clock]), sleep.end.clock, 1)
    try:
        with Mem(sleep.tracee.tid) as mem:
            left = _left_by_arguments(sleep, mem, clocks, notes)
    except OSError:
        left = 0        # the address of the timeout is no longer mapped
    return SleepLeft(vpid, sleep.number, min(left, ENDLESS - 1), clock, 0)


def _left_by_arguments(sleep: Sleep, mem: Mem, clocks: Mapping[int, int], notes: WaitNotes) -> int:
    """Return the time left according to the arguments of the call: the remaining time that the kernel has written, if
    the program asked for it; else the timeout, less the time since the task was seen to sleep."""
    number, regs = sleep.number, sleep.regs
    remaining = getattr(regs, _REMAINING.get(number, ''), 0)
    if remaining:
        return _timespec(mem, remaining)
    whole = ctypes.c_int32(regs.rdx).value * 10**6 if number == _NR['poll'] \
        else _timespec(mem, getattr(regs, _TIMEOUT[number]))
    begun = notes.begun(sleep.tracee.tid, regs)
    # CPU time does not pass while a task sleeps
    if begun is None or sleep.clock not in _HRTIMER_CLOCKS:
        return whole
    return min(whole, max(0, begun + whole - clocks[time.CLOCK_MONOTONIC]))


def _timespec(mem: Mem, address: int) -> int:
    seconds, nanoseconds = struct.unpack('<2q', mem.read(address, 16))
    return int(seconds * 10**9 + nanoseconds)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interrupted sleeps: how much of them is left is known to the nanosecond, and they are none the worse for it."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ckptd import faults
from ckptd.dump import sleeps, waits
from ckptd.dump.resume import issue_again, wait_on
from ckptd.dump.sleeps import find_sleeps
from ckptd.dump.waits import WaitNotes, note_waits
from ckptd.image.reader import ImageReader
from ckptd.image.records import ENDLESS, SleepLeft
from ckptd.inspect.scan import scan_tree
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.blocked import BlockedCall
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.task import read_threads
from ckptd.kernel.timens import ClockReadings
from ckptd.kernel.timer_list import End, read_sleeps
from ckptd.kernel.wchan import read_wchan
from ckptd.operation import timers
from ckptd.operation.timers import OwnTimers
from ckptd.remote.borrow import OwnIds
from tests.worker.conftest import in_child
from tests.worker.driver import Place

pytestmark = [pytest.mark.needs('ptrace', 'gcc')]

Stop = Callable[[int], tuple[Tracee, OwnIds]]
Sleeper = Callable[..., int]
MANY = 40
LONG = '4567'       # seconds: longer than a checkpoint on a busy machine, and than whatever else sleeps on it
SECOND = 10**9
MILLISECOND = 10**6


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Starts sleep(1), asleep already when its pid is given."""
    started: list[subprocess.Popen[bytes]] = []

    def start(seconds: float) -> int:
        process = subprocess.Popen(['sleep', str(seconds)])
        started.append(process)
        while 'nanosleep' not in read_wchan(process.pid):
            os.sched_yield()
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def left(place: Place, pid: int, **options: Any) -> tuple[dict[int, int], dict[int, SleepLeft]]:
    """The clocks of a checkpoint by CLOCK_*, and the records by vpid."""
    with ImageReader(place.checkpoint(pid, **options)) as reader:
        clocks = reader.manifest.clocks
        return ({time.CLOCK_MONOTONIC: clocks.monotonic, time.CLOCK_BOOTTIME: clocks.boottime},
                dict(reader.table(SleepLeft)))


def refuse() -> None:
    raise PermissionError


@pytest.mark.needs('root')
@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
def test_every_call_of_the_victim(victim: Any, place: Place, freeze: str) -> None:
    """Once interrupted, all of them are restart_syscall: the second checkpoint tells them apart all the same."""
    one = victim('interrupted', LONG)
    first_at, first = left(place, one.pid, freeze=freeze)
    second_at, second = left(place, one.pid, freeze=freeze)
    assert {tid: row.number for tid, row in first.items()} == {tid: row.number for tid, row in second.items()}
    numbers = sorted(row.number for row in first.values())
    assert numbers == sorted(arch.NR[name] for name in (
        'nanosleep', 'nanosleep', 'clock_nanosleep', 'poll', 'poll', 'futex'))
    assert all(row.exact for row in [*first.values(), *second.values()])
    assert sum(row.left_ns == ENDLESS for row in first.values()) == 1
    for tid, row in first.items():
        if row.left_ns != ENDLESS:
            assert 0 < row.left_ns < int(LONG) * SECOND
            assert first_at[row.clock] + row.left_ns == second_at[row.clock] + second[tid].left_ns
    clocks = {row.number: row.clock for row in first.values() if row.left_ns != ENDLESS}
    assert clocks.pop(arch.NR['clock_nanosleep']) == time.CLOCK_BOOTTIME
    assert set(clocks.values()) == {time.CLOCK_MONOTONIC}


@pytest.mark.needs('root')
def test_many_at_a_time(sleeper: Sleeper, tracer: Stop) -> None:
    bounds = {}         # by pid: the ends of sleeps that began before it was started, and when it was seen
    for index in range(MANY):
        seconds = 100 + index * 7 % MANY
        earliest = time.monotonic_ns() + seconds * SECOND
        bounds[sleeper(seconds)] = earliest, time.monotonic_ns() + seconds * SECOND
    tracees = {pid: tracer(pid)[0] for pid in bounds}
    before = {pid: bytes(tracee.regs) for pid, tracee in tracees.items()}
    found = find_sleeps(tracees, OwnTimers())
    assert {pid: bytes(tracee.regs) for pid, tracee in tracees.items()} == before
    assert set(found) == set(bounds)
    for pid, sleep in found.items():
        assert sleep.end is not None
        earliest, latest = bounds[pid]
        assert earliest <= sleep.end.at < latest + SECOND // 2      # the timer slack is in the end
    assert {pid: sleep.end for pid, sleep in find_sleeps(tracees, OwnTimers()).items()} \
        == {pid: sleep.end for pid, sleep in found.items()}


@pytest.mark.needs('root')
def test_one_that_is_over_meanwhile_has_its_result(sleeper: Sleeper, tracer: Stop,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = sleeper(100), sleeper(2)
    tracees = {pid: tracer(pid)[0] for pid in (short, long)}

    def until_over(point: str) -> None:
        while 'ptrace_stop' not in read_wchan(short):
            os.sched_yield()

    assert tracees[short].regs.rax == 2**64 - arch.ERESTART_RESTARTBLOCK
    monkeypatch.setattr(sleeps, 'fault', until_over)
    assert set(find_sleeps(tracees, OwnTimers())) == {long}
    assert tracees[short].regs.rax == 0
    tracees[short].detach()
    assert os.waitpid(short, 0)[1] == 0


@pytest.mark.needs('root')
def test_a_signal_that_comes_meanwhile_is_not_lost(sleeper: Sleeper, tracer: Stop,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    pid = sleeper(100)
    tracee = tracer(pid)[0]
    monkeypatch.setattr(sleeps, 'fault', lambda point: os.kill(pid, signal.SIGTERM))
    find_sleeps({pid: tracee}, OwnTimers())
    tracee.detach()
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM


@pytest.mark.needs('root')
@pytest.mark.parametrize('dies', [False, True], ids=['error', 'dies'])
def test_a_tracer_that_fails_meanwhile(victim: Any, monkeypatch: pytest.MonkeyPatch, *, dies: bool) -> None:
    """The tasks sleep on, to the end that they had."""
    one = victim('interrupted')
    monkeypatch.setitem(faults._PLAN, 'asleep-again', 'kill' if dies else 'error:EIO')

    def trace() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        tracees = {tid: Tracee.seize(tid) for tid in read_threads(one.pid)}
        for tracee in tracees.values():
            tracee.stop()
        try:
            with pytest.raises(OSError, match='asleep-again'):
                find_sleeps(tracees, OwnTimers())
            assert all(tracee.is_stopped() for tracee in tracees.values())
        finally:
            for tracee in tracees.values():
                tracee.detach()

    status = in_child(trace)
    assert os.WTERMSIG(status) == signal.SIGKILL if dies else status == 0
    one.finish()


@pytest.mark.parametrize('noted', [False, True], ids=['unseen', 'noted'])
def test_without_the_list_of_timers_there_is_a_bound(victim: Any, tracer: Stop, monkeypatch: pytest.MonkeyPatch, *,
                                                     noted: bool) -> None:
    """The whole timeout, or what was left of it by the scheduler's account; in one case the kernel has said it."""
    monkeypatch.setattr(timers, 'read_sleeps', refuse)
    monkeypatch.setattr(waits, 'read_sleeps', refuse)
    pid = victim('interrupted', LONG).pid
    notes = note_waits(scan_tree([pid])) if noted else WaitNotes()
    tracees = {tid: tracer(tid)[0] for tid in read_threads(pid)}
    clocks = ClockReadings.read(pid).host
    rows = [sleeps.sleep_left(sleep, tid, clocks, notes) for tid, sleep in find_sleeps(tracees, OwnTimers()).items()]
    bounded = sorted(row.left_ns for row in rows if row.left_ns != ENDLESS)
    assert [row.exact for row in rows if row.left_ns != ENDLESS] == [0] * 5
    assert len(rows) == 6
    # 0.6 s have passed when the victim is ready
    assert 0 < bounded[0] < (int(LONG) - 0.5) * SECOND
    if noted:
        assert bounded[4] < (int(LONG) - 0.5) * SECOND
    else:
        assert bounded[1:] == [int(LONG) * SECOND] * 4


# ---------------------------------------------------------------- calls that are issued again

BEFORE = 9 * SECOND // 10       # a call that began anew is later by more, see the victim
TIMED = {arch.NR[name] for name in ('epoll_wait', 'epoll_pwait', 'semtimedop')}


@pytest.mark.needs('root')
@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
def test_calls_that_no_kernel_restarts_in_an_image(victim: Any, place: Place, freeze: str) -> None:
    seconds = {'auto': 5678, 'ptrace': 6789}[freeze]        # of no other test that may run beside this one
    one = victim('never_restarted', str(seconds))
    now = time.monotonic_ns()
    first, last = ends_between(read_sleeps(), now + (seconds - 60) * SECOND, now + seconds * SECOND)
    _, rows = left(place, one.pid, freeze=freeze)
    assert {row.number: row.exact for row in rows.values()} == {
        arch.NR['semtimedop']: last - first < waits._ALIKE, arch.NR['nanosleep']: 1}
    ends = [row.left_ns for row in rows.values()]
    assert max(ends) - min(ends) < BEFORE       # they began together, and are equally long


def ends_between(ends: Counter[End] | None, earliest: int, latest: int) -> list[int]:
    return sorted(end.at for end in (ends or Counter()).elements()
                  if end.clock == time.CLOCK_MONOTONIC and earliest < end.at < latest)


def is_quiet(notes: WaitNotes, wait: waits.Wait) -> bool:
    """Nobody else sleeps until about then, and the victim's threads, one of which is restarted, began together."""
    near = ends_between(notes.ends, wait.end - SECOND // 2, wait.end + SECOND // 2)
    return len(near) == len(TIMED) + 1 and near[-1] - near[0] < waits._ALIKE


@pytest.mark.needs('root')
@pytest.mark.parametrize('readable', [True, False], ids=['exact', 'bounded'])
def test_calls_that_no_kernel_restarts(victim: Any, tracer: Stop, monkeypatch: pytest.MonkeyPatch, *,
                                       readable: bool) -> None:
    """Issued again, with what was left where the timeout is in a register. Without the list of timers the scheduler
    says when the call began."""
    if not readable:
        monkeypatch.setattr(waits, 'read_sleeps', refuse)
    one = victim('never_restarted', '4', 'epoll')
    notes = note_waits(scan_tree([one.pid]))
    tracees = {tid: tracer(tid)[0] for tid in read_threads(one.pid)}
    found = issue_again(tracees, notes)
    now = time.monotonic_ns()
    assert {wait.number for wait in found.values()} == TIMED
    ends = [wait.end for wait in found.values()]
    for tid, wait in found.items():
        if not readable or is_quiet(notes, wait):
            assert wait.exact == readable
        assert 0 < wait.end - now < 4 * SECOND - SECOND // 2
        if wait.number != arch.NR['semtimedop']:
            assert 0 < tracees[tid].regs.r10 <= (wait.end - now) // 10**6 + 1000
    assert max(ends) - min(ends) < BEFORE
    wait_on(tracees, found)
    assert all(tracees[tid].regs.r10 < 3500 for tid, wait in found.items() if wait.number != arch.NR['semtimedop'])
    for tracee in tracees.values():
        tracee.detach()
    one.finish()


@pytest.mark.parametrize(('others', 'exact'), [
    ((), True),
    ((-5, -3), True),                   # as good as it
    ((-100,), False),                   # which of them is its own there is no telling: the later
    ((-400, 20, 400), True),            # these can not be its own
    ((-100, -100), False),
], ids=str)
def test_whose_end_it_is(others: tuple[int, ...], *, exact: bool) -> None:
    """Of a call of 700 ms that began a second after the machine, seen 100 ms later; others: in ms after its end."""
    regs = arch.user_regs_struct(orig_rax=arch.NR['epoll_wait'], r10=700)
    note = waits.WaitNote(BlockedCall(regs.orig_rax, (0, 0, 0, 700, 0, 0)), SECOND)
    its_own = SECOND + 700 * MILLISECOND
    ends = Counter(End(time.CLOCK_MONOTONIC, its_own + other * MILLISECOND) for other in (0, *others))
    ends[End(time.CLOCK_BOOTTIME, its_own - 50 * MILLISECOND)] += 1
    wait = waits.wait_of(1, regs, WaitNotes({1: note}, ends), SECOND + 100 * MILLISECOND)
    assert wait == waits.Wait(arch.NR['epoll_wait'], 700 * MILLISECOND, its_own, exact=exact)


def test_a_call_that_was_not_noted_began_since() -> None:
    regs = arch.user_regs_struct(orig_rax=arch.NR['epoll_wait'], r10=700)
    wait = waits.wait_of(1, regs, WaitNotes(), 10 * SECOND)
    assert wait == waits.Wait(arch.NR['epoll_wait'], 700_000_000, 10_700_000_000, exact=False)
    assert [wait.milliseconds(now) for now in (10 * SECOND, 10_699_999_999, 10_700_000_000, 20 * SECOND, 0)] \
        == [700, 1, 0, 0, 700]
    regs.r10 = 2**32 - 1
    assert waits.wait_of(1, regs, WaitNotes(), 0) is None

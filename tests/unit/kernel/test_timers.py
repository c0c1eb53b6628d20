# SPDX-License-Identifier: LGPL-2.1-or-later
"""What sleeps in the kernel, since when and until when, and the clocks of a time namespace."""

import os
import time
from collections.abc import Callable

import pytest

from ckptd.kernel import timens
from ckptd.kernel.blocked import (
    BlockedCall,
    LastRun,
    cpu_clocks,
    parse_call,
    parse_exec_start,
    read_call,
    read_last_run,
)
from ckptd.kernel.timens import ClockReadings, Offsets, parse_offsets, read_offsets
from ckptd.kernel.timer_list import End, parse_sleeps

NR_PAUSE = 34       # <asm/unistd_64.h>
TIMER_LIST = b"""Timer List Version: v0.10
HRTIMER_MAX_CLOCK_BASES: 8
now at 1122262935054 nsecs

cpu: 0
 clock 0:
  .base:       00000000c0cabc68
  .index:      0
  .resolution: 1 nsecs
  .offset:     0 nsecs
active timers:
 #0: <00000000276479fb>, tick_nohz_handler, S:01
 # expires at 1122264000000-1122264000000 nsecs [in 1064946 to 1064946 nsecs]
 #1: <0000000025078c90>, hrtimer_wakeup, S:01
 # expires at 1122314743106-1122314912105 nsecs [in 51808052 to 51977051 nsecs]
 clock 2:
  .base:       00000000d7e9cb78
  .index:      2
active timers:
 #0: <00000000d156d76b>, hrtimer_wakeup, S:01
 # expires at 1141660170741-1141660220741 nsecs [in 19397235687 to 19397285687 nsecs]
  .expires_next   : 1122264000000 nsecs

cpu: 1
 clock 4:
  .index:      4
active timers:
 #0: <000000001ab381e0>, hrtimer_wakeup, S:01
 # expires at 1122314743106-1122314743106 nsecs [in 51808052 to 51808052 nsecs]
"""


def test_parse_sleeps() -> None:
    assert parse_sleeps(TIMER_LIST) == {End(time.CLOCK_MONOTONIC, 1122314743106): 2,
                                        End(time.CLOCK_BOOTTIME, 1141660170741): 1}
    assert parse_sleeps(b'') == {}


def test_parse_offsets() -> None:
    assert parse_offsets(b'monotonic           0         0\nboottime            0         0\n') == Offsets(0, 0)
    assert parse_offsets(b'monotonic      -86401 500000000\nboottime           7         1\n') \
        == Offsets(-86_400_500_000_000, 7_000_000_001)


def test_clocks_of_this_process_are_its_own() -> None:
    before = time.monotonic_ns()
    clocks = ClockReadings.read(os.getpid())
    assert before <= clocks.monotonic <= time.monotonic_ns()
    assert clocks.monotonic == clocks.host[time.CLOCK_MONOTONIC] + clocks.monotonic_offset
    assert (clocks.monotonic_offset, clocks.boottime_offset) == read_offsets(os.getpid())


def test_clocks_of_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both its offsets and ours count: we see the initial clock only through our own."""
    other = os.getpid() + 1
    monkeypatch.setattr(timens, 'read_offsets', lambda pid: Offsets(10**12, -5) if pid == other else Offsets(10**9, 7))
    clocks, now = ClockReadings.read(other), time.monotonic_ns()
    assert abs(clocks.monotonic - (now - 10**9 + 10**12)) < 10**9
    assert clocks.host[time.CLOCK_BOOTTIME] - clocks.boottime == 5


# ---------------------------------------------------------------- what a task is blocked in

def test_parse_call() -> None:
    assert parse_call(b'230 0x0 0x1 0x7ffedff09a10 0x7ffedff09a50 0x0 0x5 0x7ffedff099f8 0x7ffbb39c3503\n') \
        == BlockedCall(230, (0, 1, 0x7ffedff09a10, 0x7ffedff09a50, 0, 5))
    assert parse_call(b'running\n') is None
    assert parse_call(b'-1 0x7ffedff099f8 0x7ffbb39c3503\n') is None


def test_parse_exec_start() -> None:
    assert parse_exec_start(b'sleep (6438, #threads: 1)\n-----\n'
                            b'se.exec_start                                :       1122093.902481\n'
                            b'se.vruntime                                  :           158.384680\n') == 1122093902481


def test_when_a_child_went_to_sleep(forked: Callable[..., int]) -> None:
    before = time.monotonic_ns()
    pid = forked()
    while (call := read_call(pid, pid)) is None or call.number != NR_PAUSE:
        os.sched_yield()
    after = time.monotonic_ns()
    run = read_last_run(pid, pid)
    assert run is not None
    affinity = os.sched_getaffinity(0)
    with cpu_clocks() as clocks:
        begun = clocks.monotonic(run)
        assert clocks.monotonic(LastRun(10**6, 0)) is None      # there is no such CPU
    assert os.sched_getaffinity(0) == affinity
    # the CPU's clock stands still now and then
    assert begun is not None
    assert before < begun < after + 10**8

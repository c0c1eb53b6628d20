# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads, children, namespaces, limits, timers."""

import ctypes
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ckptd.kernel import task

AT_PAGESZ, AT_UID, AT_HWCAP = 6, 11, 16         # getauxval(3)
LIMITS = b"""Limit                     Soft Limit           Hard Limit           Units
Max cpu time              unlimited            unlimited            seconds
Max file size             4096                 unlimited            bytes
Max data size             unlimited            unlimited            bytes
Max stack size            8388608              unlimited            bytes
Max core file size        0                    unlimited            bytes
Max resident set          unlimited            unlimited            bytes
Max processes             96365                96366                processes
Max open files            1024                 20000                files
Max locked memory         8388608              8388608              bytes
Max address space         unlimited            unlimited            bytes
Max file locks            unlimited            unlimited            locks
Max pending signals       96365                96365                signals
Max msgqueue size         819200               819200               bytes
Max nice priority         0                    0
Max realtime priority     0                    0
Max realtime timeout      unlimited            unlimited            us
"""
TIMERS = b"""ID: 0
signal: 14/00007ffd1c5a0e10
notify: signal/pid.1234
ClockID: 0
ID: 7
signal: 34/0000000000000007
notify: signal/tid.1240
ClockID: 1
ID: 8
signal: 0/0000000000000000
notify: none/pid.1234
ClockID: -6
"""


def test_pids_as_psutil_has_them() -> None:
    before, ours, after = set(psutil.pids()), set(task.pids()), set(psutil.pids())
    assert os.getpid() in ours
    assert before & after <= ours


def test_threads_leader_first() -> None:
    go = threading.Event()
    threads = [threading.Thread(target=go.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        tids = task.read_threads(os.getpid())
        assert tids[0] == os.getpid()
        assert tids[1:] == sorted(tids[1:])
        assert {thread.native_id for thread in threads} < set(tids)
    finally:
        go.set()
        for thread in threads:
            thread.join()


def test_children_in_order_of_birth(forked: Callable[..., int]) -> None:
    born = [forked() for _ in range(3)]
    listed = task.read_children(os.getpid(), os.getpid())
    assert [pid for pid in listed if pid in born] == born
    assert task.read_children(born[0], born[0]) == []


def test_dead_and_reaped_is_no_such_process_for_every_reader() -> None:
    gone = 2**22 + 1
    readers: list[Callable[[int], object]] = [
        task.read_threads, lambda pid: task.read_children(pid, pid), task.read_cgroup2, task.read_namespaces,
        task.read_auxv, task.read_limits, task.read_timers, lambda pid: task.read_link(pid, 'exe'),
        task.read_personality, task.read_oom_score_adj, task.read_timerslack]
    for read in readers:
        with pytest.raises(ProcessLookupError):
            read(gone)


def test_what_a_zombie_has_no_more_is_not_found(forked: Callable[..., int]) -> None:
    pid = forked()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(FileNotFoundError):
        task.read_link(pid, 'cwd')
    assert 'net' not in task.read_namespaces(pid)
    assert task.read_threads(pid) == [pid]
    assert task.read_auxv(pid) == b''


def test_cgroup_lines() -> None:
    captured = b'2:pids:/x\n1:name=systemd:/\n0::/system.slice/a:b.service\n'
    assert task.parse_cgroup2(captured) == '/system.slice/a:b.service'
    assert task.parse_cgroup2(b'1:cpu:/\n') == ''


def test_namespaces_are_the_inodes_of_the_links() -> None:
    found = task.read_namespaces(os.getpid())
    assert found == {path.name: path.stat().st_ino for path in Path('/proc/self/ns').iterdir()}
    assert {'mnt', 'net', 'pid', 'pid_for_children', 'user'} <= found.keys()


def test_auxv() -> None:
    auxv = task.parse_auxv(task.read_auxv(os.getpid()))
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype = ctypes.c_ulong
    # glibc puts numbers of its own in place of AT_HWCAP
    assert all(value == getauxval(ctypes.c_ulong(key)) for key, value in auxv.items() if key != AT_HWCAP)
    assert (auxv[AT_PAGESZ], auxv[AT_UID]) == (os.sysconf('SC_PAGESIZE'), os.getuid())
    assert 0 not in auxv


def test_limits_captured() -> None:
    limits = task.parse_limits(LIMITS)
    assert len(limits) == task.RLIM_NLIMITS
    assert limits[resource.RLIMIT_FSIZE] == (4096, task.RLIM_INFINITY)
    assert limits[resource.RLIMIT_NPROC] == (96365, 96366)
    assert limits[resource.RLIMIT_NOFILE] == (1024, 20000)
    assert limits[15] == (task.RLIM_INFINITY, task.RLIM_INFINITY)


def test_limits_as_getrlimit_has_them() -> None:
    wanted = tuple(tuple(value % 2**64 for value in resource.getrlimit(number)) for number in range(task.RLIM_NLIMITS))
    assert task.read_limits(os.getpid()) == wanted


def test_timers_captured() -> None:
    assert task.parse_timers(TIMERS) == (
        task.ProcTimer(0, 14, 0x7FFD1C5A0E10, task.SIGEV_SIGNAL, 0, 0),
        task.ProcTimer(7, 34, 7, task.SIGEV_SIGNAL | task.SIGEV_THREAD_ID, 1240, 1),
        task.ProcTimer(8, 0, 0, task.SIGEV_NONE, 0, -6))
    assert task.parse_timers(b'') == ()


def test_a_real_timer() -> None:
    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    assert libc.timer_create(1, None, ctypes.byref(timer)) == 0     # CLOCK_MONOTONIC, SIGALRM
    try:
        found, = task.read_timers(os.getpid())
        assert (found.signal, found.notify, found.tid, found.clock) == (signal.SIGALRM, task.SIGEV_SIGNAL, 0, 1)
    finally:
        libc.timer_delete(timer)


def test_single_values() -> None:
    pid = os.getpid()
    assert task.read_link(pid, 'cwd') == str(Path.cwd())
    assert task.read_link(pid, 'exe') == str(Path('/proc/self/exe').readlink())
    assert task.read_oom_score_adj(pid) == int(Path('/proc/self/oom_score_adj').read_text())
    assert task.read_timerslack(pid) == int(Path('/proc/self/timerslack_ns').read_text())
    assert task.read_personality(pid) == ctypes.CDLL(None).personality(0xFFFFFFFF)
    assert len(task.boot_id()) == 36
    assert task.task_exists(pid)
    assert not task.task_exists(2**22 + 1)

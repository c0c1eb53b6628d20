# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ptrace freezer: every thread stops, and runs on as if nothing had been."""

import ctypes
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import Cancelled, FreezeTimeout, NotSupported, PermissionDenied
from ckptd.freezer import FrozenTree, freeze
from ckptd.inspect.scan import ResolvedTarget, scan_tree
from ckptd.journal import Journal
from ckptd.kernel.ptrace import Tracee, let_go
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.tree import Tree
from tests.freezer.conftest import Ticker, is_frozen, set_frozen
from tests.lib.ways import let_others_through

pytestmark = pytest.mark.needs('ptrace', 'root', 'cgroup2')
Freeze = Callable[..., AbstractContextManager[FrozenTree]]
Tick = Callable[..., Ticker]
NOBODY = 65534
PR_SET_DUMPABLE = 4             # <linux/prctl.h>


@pytest.fixture
def stopped(journal: Journal) -> Freeze:
    """stopped(ticker): its tree, frozen by ptrace."""
    @contextmanager
    def start(ticker: Ticker, timeout: float = 5, **kwargs: Any) -> Iterator[FrozenTree]:
        with freeze(ticker.scan(), ticker.target, 'ptrace', time.monotonic() + timeout, journal, ticker.scan,
                    **kwargs) as frozen:
            yield frozen
    return start


def test_every_thread_is_stopped_and_runs_on(cgroup: Path, tick: Tick, stopped: Freeze, journal: Journal) -> None:
    ticker, stranger = tick(children=2, how='threads'), tick()
    with stopped(ticker) as held:
        assert ticker.stands_still(3)
        assert stranger.runs()
        assert not is_frozen(cgroup)
        assert {task.tid for task in ticker.scan()} == held.tracees.keys()
        assert {task.state for task in ticker.scan()} == {'t'}
        assert [entry.begin.mode for entry in journal.entries()] == ['ptrace']
        held.let_run()
        held.hold()
        assert ticker.stands_still(3)
    assert all(ticker.runs(slot) for slot in range(3))
    assert all(read_status(task.tgid, task.tid).tracer_pid == 0 for task in ticker.scan())
    assert journal.entries() == []


def test_tree_that_forks_all_the_time(tick: Tick, stopped: Freeze) -> None:
    ticker = tick(children=6, how='churn')
    for _ in range(5):
        with stopped(ticker) as held:
            assert ticker.stands_still(7)
            assert held.tree.ids == ticker.scan().ids
        assert all(ticker.runs(slot) for slot in range(7))


def test_group_stop_stays(tick: Tick, stopped: Freeze) -> None:
    ticker = tick()
    os.kill(ticker.pid, signal.SIGSTOP)
    assert os.waitpid(ticker.pid, os.WUNTRACED)[0] == ticker.pid
    with stopped(ticker) as held:
        assert held.tracees[ticker.pid].stop_signal == signal.SIGSTOP
    assert ticker.comes_to('T')
    os.kill(ticker.pid, signal.SIGCONT)
    assert ticker.runs()


def test_what_is_stopped_is_so_before_anybody_runs() -> None:
    """Its parent may ask for it at once."""
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    running = os.fork()
    if running == 0:
        while True:
            signal.pause()
    try:
        assert os.waitpid(child, os.WUNTRACED)[0] == child
        for _ in range(50):
            tracees = [Tracee.seize(running), Tracee.seize(child)]
            for tracee in tracees:
                tracee.stop()
            let_go(tracees)
            assert read_stat(child).state == 'T'
            assert read_status(running).tracer_pid == read_status(child).tracer_pid == 0
    finally:
        for pid in (child, running):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_one_that_goes_on_is_not_waited_for_forever() -> None:
    """Somebody sends SIGCONT while it is traced."""
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            pass
    try:
        assert os.waitpid(child, os.WUNTRACED)[0] == child
        tracee = Tracee.seize(child)
        tracee.stop()
        assert tracee.stop_signal == signal.SIGSTOP
        os.kill(child, signal.SIGCONT)
        let_go([tracee])
        assert read_status(child).tracer_pid == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize('how', ['stuck', 'vfork'])
def test_deadline_names_the_task_that_is_stuck(tick: Tick, stopped: Freeze, how: str) -> None:
    ticker = tick(children=1, how=how)
    assert ticker.comes_to('D')
    with pytest.raises(FreezeTimeout, match='does not stop: state D') as caught, stopped(ticker, timeout=2):
        pass
    assert [row.pid for row in caught.value.refusals] == [ticker.pid]
    assert ticker.runs(1)


def test_control_fd_cancels_the_wait(tick: Tick, stopped: Freeze) -> None:
    ticker = tick(children=1, how='stuck')
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)

    def check() -> None:
        if os.read(ours, 1):
            raise Cancelled('cancelled')

    try:
        assert ticker.comes_to('D')
        with pytest.raises(Cancelled), stopped(ticker, timeout=30, also=ours, check=check,
                                               at=lambda point: os.write(theirs, b'c') and None):
            pass
    finally:
        os.close(ours)
        os.close(theirs)
    assert ticker.runs(1)


def test_other_tracer_is_named(tick: Tick, stopped: Freeze) -> None:
    ticker = tick(children=1)
    child = os.fork()
    if child == 0:
        Tracee.seize(ticker.pids[1])
        signal.pause()
    try:
        deadline = time.monotonic() + 20
        while read_status(ticker.pids[1]).tracer_pid != child:
            assert time.monotonic() < deadline
        with pytest.raises(PermissionDenied, match=f'is being traced by process {child}'), stopped(ticker):
            pass
        assert ticker.runs()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_frozen_tree_is_refused(cgroup: Path, tick: Tick, stopped: Freeze) -> None:
    ticker = tick()
    set_frozen(cgroup, True)
    with pytest.raises(NotSupported, match='is frozen'), stopped(ticker):
        pass
    with stopped(ticker, remote_calls=False):
        set_frozen(cgroup, False)
        assert ticker.stands_still()
    assert ticker.runs()


def test_ordinary_user_gets_the_ptrace_freezer(tmp_path: Path) -> None:
    """Who may not write to the cgroup still freezes what is theirs."""
    let_others_through(tmp_path)
    runtime = tmp_path / 'run'
    runtime.mkdir()
    os.chown(runtime, NOBODY, NOBODY)
    victim = as_nobody(signal.pause)

    def freeze_it() -> None:
        def scan() -> Tree:
            return scan_tree((victim,))

        target = ResolvedTarget((victim,), None, None, 'victim')
        deadline = time.monotonic() + 5
        with freeze(scan(), target, 'auto', deadline, Journal(runtime), scan) as frozen:
            assert (frozen.mode, scan().root.state) == ('ptrace', 't')
        with pytest.raises(NotSupported, match='cgroup freezer: making cgroup'), \
                freeze(scan(), target, 'cgroup', deadline, Journal(runtime), scan):
            pass

    try:
        assert os.waitpid(as_nobody(freeze_it), 0)[1] == 0
    finally:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    assert list((runtime / 'freezes').iterdir()) == []


def as_nobody(work: Callable[[], object]) -> int:
    """The pid of a child that does the work as an ordinary user, and ends with 0 if it can."""
    ready, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            # a change of uid makes it undumpable, and then no other process of that user may trace it: prctl(2)
            ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            os.write(theirs, b'r')
            work()
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    os.close(theirs)
    assert os.read(ready, 1) == b'r'
    os.close(ready)
    return child


def test_signal_mask_is_as_before(tick: Tick, stopped: Freeze) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with stopped(tick()):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

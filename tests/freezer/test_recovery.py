# SPDX-License-Identifier: LGPL-2.1-or-later
"""A freeze whose owner is killed, at each of its steps: the tree is as it was found after the recovery."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from ckptd.freezer import freeze
from ckptd.journal import Journal, recover
from tests.freezer.conftest import Ticker, cgroups_of, is_frozen, name_of, set_frozen

pytestmark = pytest.mark.needs('root', 'cgroup2', 'ptrace')
ROOT = Path(__file__).parents[2]
Tick = Callable[..., Ticker]
Nest = Callable[[str], Path]

IN_PLACE = ('freeze-begin', 'freeze-freeze', 'freeze-freeze-done', 'seized', 'let-run-freeze', 'let-run-freeze-done',
            'running', 'hold-freeze', 'hold-freeze-done', 'held', 'undo-freeze')
MOVED = ('freeze-begin', 'freeze-make', 'freeze-make-done', 'freeze-freeze', 'freeze-freeze-done', 'freeze-move',
         'freeze-move-done', 'seized', 'let-run-freeze', 'let-run-freeze-done', 'running', 'hold-freeze',
         'hold-freeze-done', 'held', 'undo-move', 'undo-freeze', 'undo-make')
# between let_run and hold nothing but ptrace keeps the tree still, and that ends with its owner
RAN = ('let-run-freeze-done', 'running', 'hold-freeze')
TRACED = ('freeze-begin', 'freeze-seize', 'freeze-seize-done', 'seized', 'running')


class Killed(Protocol):
    def __call__(self, ticker: Ticker, point: str, mode: str = 'cgroup') -> None: ...


@pytest.fixture(scope='module')
def owner() -> Iterator['subprocess.Popen[str]']:
    with subprocess.Popen([sys.executable, '-m', 'tests.freezer.owner'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, cwd=ROOT) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


@pytest.fixture
def killed(owner: 'subprocess.Popen[str]', journal: Journal) -> Killed:
    """killed(ticker, point): a freeze of it whose owner died there."""
    def freeze(ticker: Ticker, point: str, mode: str = 'cgroup') -> None:
        assert owner.stdin is not None
        assert owner.stdout is not None
        print(journal.directory.parent, ticker.pid, '-', mode, point, file=owner.stdin, flush=True)
        assert owner.stdout.readline() == 'killed\n'
    return freeze


def recovered(journal: Journal) -> None:
    entries = journal.entries()
    assert [entry.alive for entry in entries] == [False]
    report = recover(journal)
    assert not [line for line in report if 'cannot' in line]
    assert list(journal.directory.iterdir()) == []
    assert recover(journal) == []


@pytest.mark.parametrize('point', IN_PLACE)
def test_frozen_in_place(cgroup: Path, tick: Tick, journal: Journal, killed: Killed, point: str) -> None:
    ticker = tick(children=1)
    killed(ticker, point)
    recovered(journal)
    assert not is_frozen(cgroup)
    assert all(ticker.runs(slot) for slot in range(2))


@pytest.mark.parametrize('point', MOVED)
def test_moved(cgroup: Path, tick: Tick, journal: Journal, killed: Killed, point: str) -> None:
    ticker, stranger = tick(children=1), tick()
    killed(ticker, point)
    assert stranger.runs()
    recovered(journal)
    assert cgroups_of(ticker.pids) == [name_of(cgroup)] * 2
    assert list(cgroup.glob('*/')) == []
    assert all(ticker.runs(slot) for slot in range(2))


@pytest.mark.parametrize('point', MOVED)
def test_found_frozen(cgroup: Path, nest: Nest, tick: Tick, journal: Journal, killed: Killed, point: str) -> None:
    home = nest('home')
    ticker = tick(cgroup=home, children=1)
    set_frozen(home, True)
    before = ticker.counts(2)
    killed(ticker, point)
    recovered(journal)
    assert cgroups_of(ticker.pids) == [name_of(home)] * 2
    assert list(cgroup.rglob('*/')) == [home]
    set_frozen(home, True)
    assert ticker.stands_still(2)
    if point not in RAN:
        assert ticker.counts(2) == before
    set_frozen(home, False)
    assert all(ticker.runs(slot) for slot in range(2))


@pytest.mark.parametrize('point', TRACED)
def test_traced(tick: Tick, journal: Journal, killed: Killed, point: str) -> None:
    ticker = tick(children=1)
    killed(ticker, point, 'ptrace')
    assert all(ticker.runs(slot) for slot in range(2))
    recovered(journal)


def test_what_was_born_in_the_work_cgroup_goes_home(cgroup: Path, nest: Nest, tick: Tick, journal: Journal,
                                                    killed: Killed) -> None:
    """The owner died while the tree could run there, and the tree went on forking."""
    ticker, other = tick(children=4, how='churn'), nest('other')
    (other / 'cgroup.procs').write_text(str(ticker.pids[1]))
    killed(ticker, 'running')
    assert all(ticker.runs(slot) for slot in range(5))
    recovered(journal)
    assert cgroups_of(ticker.pids) == [name_of(cgroup), name_of(other), *[name_of(cgroup)] * 3]
    assert list(cgroup.rglob('*/')) == [other]
    assert all(ticker.runs(slot) for slot in range(5))


def test_home_that_was_removed_meanwhile(cgroup: Path, nest: Nest, tick: Tick, journal: Journal,
                                         killed: Killed) -> None:
    home = nest('home')
    ticker = tick(cgroup=home)
    set_frozen(home, True)
    killed(ticker, 'seized')
    home.rmdir()
    recovered(journal)
    assert cgroups_of(ticker.pids) == [name_of(cgroup)]
    assert ticker.runs()


def test_live_owner_is_left_alone(cgroup: Path, tick: Tick, journal: Journal) -> None:
    ticker = tick()
    with freeze(ticker.scan(), ticker.target, 'cgroup', time.monotonic() + 5, journal, ticker.scan, job=3):
        assert recover(Journal(journal.directory.parent)) == []
        entry, = Journal(journal.directory.parent).entries()
        assert (entry.alive, entry.begin.job, entry.begin.mode) == (True, 3, 'cgroup')
        assert ticker.stands_still()
    assert ticker.runs()

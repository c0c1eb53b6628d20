# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroup freezer on real trees: what stops, what does not, and what is there again afterwards."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import Cancelled, CkptError, FreezeTimeout, InvalidArgument, NotFrozen, NotSupported
from ckptd.freezer import FrozenTree, freeze
from ckptd.inspect.scan import ResolvedTarget, resolve_target, scan_tree
from ckptd.journal import Journal, recover
from ckptd.kernel.ptrace import Tracee
from ckptd.target import CgroupTarget
from tests.freezer.conftest import Ticker, cgroups_of, is_frozen, name_of, put, set_frozen

pytestmark = pytest.mark.needs('root', 'cgroup2', 'ptrace')
Freeze = Callable[..., AbstractContextManager[FrozenTree]]
Tick = Callable[..., Ticker]
Nest = Callable[[str], Path]


@pytest.fixture
def frozen(journal: Journal) -> Freeze:
    """frozen(ticker, mode): the tree of a ticker, frozen; nothing is in the journal afterwards."""
    @contextmanager
    def start(ticker: Ticker, mode: str = 'cgroup', timeout: float = 5, **kwargs: Any) -> Iterator[FrozenTree]:
        try:
            with freeze(ticker.scan(), kwargs.pop('target', ticker.target), mode, time.monotonic() + timeout, journal,
                        ticker.scan, job=7, **kwargs) as result:
                yield result
        finally:
            assert journal.entries() == []
    return start


def seize(frozen: FrozenTree) -> None:
    """What the engine does: stop every thread under ptrace."""
    for task in frozen.tree:
        if not task.is_zombie and task.tid not in frozen.tracees:
            tracee = frozen.tracees[task.tid] = Tracee.seize(task.tid)
            tracee.stop()


def test_own_cgroup_is_frozen_in_place(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker = tick(children=2)
    with frozen(ticker) as held:
        assert is_frozen(cgroup)
        assert ticker.stands_still(3)
        assert len(held.tree) == 3
    assert not is_frozen(cgroup)
    assert all(ticker.runs(slot) for slot in range(3))


def test_tree_in_cgroups_below_is_exactly_the_one_above(cgroup: Path, nest: Nest, tick: Tick, frozen: Freeze) -> None:
    ticker, below = tick(children=2), nest('a/b')
    put(below, ticker.pids[1])
    target = ResolvedTarget((ticker.pid,), name_of(cgroup), None, 'cgroup')
    with frozen(ticker, target=target):
        assert is_frozen(cgroup)
        assert ticker.stands_still(3)
        assert cgroups_of(ticker.pids[1:2]) == [name_of(below)]
    assert all(ticker.runs(slot) for slot in range(3))


def test_strangers_never_stop(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker, stranger = tick(children=2), tick()
    with frozen(ticker) as held:
        assert ticker.stands_still(3)
        assert stranger.runs()
        assert not is_frozen(cgroup)
        work = set(cgroups_of(ticker.pids))
        assert len(work) == 1
        assert work.pop().startswith(f'{name_of(cgroup)}/ckptd-7-')
        seize(held)
        held.let_run()
        assert ticker.stands_still(3)
        held.restore()
        assert ticker.stands_still(3)
        assert cgroups_of(ticker.pids) == [name_of(cgroup)] * 3
    assert all(ticker.runs(slot) for slot in range(3))
    assert list(cgroup.glob('*/')) == []


def test_each_process_goes_back_to_where_it_was(cgroup: Path, nest: Nest, tick: Tick, frozen: Freeze) -> None:
    ticker, stranger, places = tick(children=3), tick(), [nest('a'), nest('b/c')]
    put(places[0], ticker.pids[1])
    put(places[1], ticker.pids[2], stranger.pid)
    before = cgroups_of(ticker.pids)
    with frozen(ticker):
        assert len(set(cgroups_of(ticker.pids))) == 1
        assert ticker.stands_still(4)
        assert stranger.runs()
    assert cgroups_of(ticker.pids) == before
    assert all(ticker.runs(slot) for slot in range(4))


@pytest.mark.parametrize('where', ['itself', 'above', 'both'])
@pytest.mark.parametrize('shared', [False, True])
def test_found_frozen_never_runs(nest: Nest, tick: Tick, frozen: Freeze, where: str, shared: bool) -> None:
    below = nest('a/b')
    ticker = tick(cgroup=below, children=2)
    stranger = tick(cgroup=below) if shared else None
    frozen_cgroups = {'itself': [below], 'above': [below.parent], 'both': [below, below.parent]}[where]
    for path in frozen_cgroups:
        set_frozen(path, True)
    before = ticker.counts(3), stranger and stranger.count()
    with frozen(ticker) as held:
        assert cgroups_of(ticker.pids)[0].startswith(name_of((frozen_cgroups[-1]).parent) + '/ckptd-7-')
        seize(held)
        held.let_run()
        # the tracer can let one run now: it stops in the next system call, and has counted
        held.tracees[ticker.pid].cont()
        assert ticker.runs()
        held.tracees[ticker.pid].stop()
        before = [ticker.count(), *before[0][1:]], before[1]
        held.restore()
        assert cgroups_of(ticker.pids) == [name_of(below)] * 3
    assert ticker.stands_still(3)
    assert (ticker.counts(3), stranger and stranger.count()) == before
    assert [path for path in (below, below.parent) if is_frozen(path)] == frozen_cgroups
    for path in reversed(frozen_cgroups):
        set_frozen(path, False)
    assert all(ticker.runs(slot) for slot in range(3))


@pytest.mark.parametrize('frozen_name', ['a', 'a/b'])
def test_cgroup_target_found_frozen(nest: Nest, cgroup: Path, journal: Journal, tick: Tick, frozen_name: str) -> None:
    """Moved elsewhere, it is still found; a new look at the cgroup would find nobody."""
    ticker = tick(cgroup=nest('a/b'), children=1)
    set_frozen(cgroup / frozen_name, True)
    target = resolve_target(CgroupTarget(f'{name_of(cgroup)}/a'))

    def scan() -> Any:
        return scan_tree(resolve_target(CgroupTarget(f'{name_of(cgroup)}/a')).roots)

    with freeze(scan(), target, 'auto', time.monotonic() + 5, journal, scan) as held:
        assert cgroups_of(ticker.pids)[0].rpartition('/')[2].startswith('ckptd-')
        assert held.tree.ids == held.rescan().ids == ticker.scan().ids
    assert cgroups_of(ticker.pids) == [f'{name_of(cgroup)}/a/b'] * 2
    assert ticker.stands_still(2)
    set_frozen(cgroup / frozen_name, False)
    assert ticker.runs(1)


def test_partly_frozen_tree(nest: Nest, tick: Tick, frozen: Freeze) -> None:
    ticker, below = tick(children=2), nest('a')
    put(below, ticker.pids[1])
    set_frozen(below, True)
    before = ticker.count(1)
    with frozen(ticker) as held:
        assert ticker.stands_still(3)
        seize(held)
        held.let_run()
    assert ticker.runs(0)
    assert ticker.runs(2)
    assert ticker.count(1) == before
    assert cgroups_of(ticker.pids[1:2]) == [name_of(below)]
    assert is_frozen(below)
    set_frozen(below, False)
    assert ticker.runs(1)


def test_outer_freeze_holds_while_the_inner_one_ends(cgroup: Path, nest: Nest, tick: Tick, frozen: Freeze,
                                                     tmp_path: Path) -> None:
    inner_cgroup = nest('inner')
    outer, inner = tick(), tick(cgroup=inner_cgroup)
    everything = ResolvedTarget((outer.pid, inner.pid), name_of(cgroup), None, 'both')

    def scan() -> Any:
        return scan_tree((outer.pid, inner.pid))

    with freeze(scan(), everything, 'cgroup', time.monotonic() + 5, Journal(tmp_path / 'outer'), scan):
        before = outer.count(), inner.count()
        with frozen(inner) as held:
            seize(held)
            held.let_run()
        with frozen(inner, remote_calls=False):
            assert is_frozen(inner_cgroup)
            assert cgroups_of([inner.pid]) == [name_of(inner_cgroup)]
        assert not is_frozen(inner_cgroup)
        assert is_frozen(cgroup)
        assert outer.stands_still()
        assert inner.stands_still()
        assert (outer.count(), inner.count()) == before
    assert outer.runs()
    assert inner.runs()


def test_inner_freeze_holds_while_the_outer_one_ends(cgroup: Path, nest: Nest, tick: Tick, frozen: Freeze,
                                                     tmp_path: Path) -> None:
    inner_cgroup = nest('inner')
    outer, inner = tick(), tick(cgroup=inner_cgroup)
    everything = ResolvedTarget((outer.pid, inner.pid), name_of(cgroup), None, 'both')

    def scan() -> Any:
        return scan_tree((outer.pid, inner.pid))

    with frozen(inner, remote_calls=False):
        with freeze(scan(), everything, 'cgroup', time.monotonic() + 5, Journal(tmp_path / 'outer'), scan):
            assert outer.stands_still()
        assert outer.runs()
        assert inner.stands_still()
    assert inner.runs()


def test_hold_freezes_again_after_let_run(tick: Tick, frozen: Freeze) -> None:
    ticker, stranger = tick(children=1), tick()
    with frozen(ticker) as held:
        seize(held)
        held.let_run()
        held.hold()
        while held.tracees:
            held.tracees.popitem()[1].detach()
        assert ticker.stands_still(2)
        assert stranger.runs()
    assert ticker.runs(0)
    assert ticker.runs(1)


def test_hold_and_release_of_what_was_found_frozen(nest: Nest, tick: Tick, frozen: Freeze) -> None:
    home = nest('home')
    ticker = tick(cgroup=home, children=1)
    set_frozen(home, True)
    before = ticker.counts(2)
    with frozen(ticker) as held:
        seize(held)
        held.let_run()
        held.hold()
        while held.tracees:
            held.tracees.popitem()[1].detach()
        assert ticker.stands_still(2)
    assert ticker.stands_still(2)
    assert ticker.counts(2) == before
    set_frozen(home, False)
    assert ticker.runs()


def test_tree_that_forks_all_the_time(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker, stranger = tick(children=6, how='churn'), tick()
    for _ in range(5):
        with frozen(ticker) as held:
            assert ticker.stands_still(7)
            assert stranger.runs()
            assert set(cgroups_of([task.tid for task in held.tree if not task.is_zombie])) != {name_of(cgroup)}
            assert held.tree.ids == ticker.scan().ids
        assert all(ticker.runs(slot) for slot in range(7))
    assert list(cgroup.glob('*/')) == []


def test_deadline_names_the_task_that_is_stuck(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker, stranger = tick(children=1, how='stuck'), tick()
    assert ticker.comes_to('D')
    with pytest.raises(FreezeTimeout, match='D, sleeps in handle_userfault') as caught, frozen(ticker, timeout=2):
        pass
    assert [row.pid for row in caught.value.refusals] == [ticker.pid]
    assert ticker.runs(1)
    assert stranger.runs()
    assert cgroups_of(ticker.pids) == [name_of(cgroup)] * 2
    assert list(cgroup.glob('*/')) == []


def test_parent_in_vfork_is_frozen(tick: Tick, frozen: Freeze) -> None:
    ticker = tick(children=1, how='vfork')
    assert ticker.comes_to('D')
    with frozen(ticker) as held:
        assert held.tree.root.state == 'D'
        assert ticker.stands_still(2)
    assert ticker.runs(1)


def test_control_fd_cancels_the_wait(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker = tick(how='stuck')
    assert ticker.comes_to('D')
    ours, theirs = os.pipe()

    def check() -> None:
        os.set_blocking(ours, False)
        if os.read(ours, 1):
            raise Cancelled('cancelled')

    def at(point: str) -> None:
        if point == 'freeze-freeze-done':
            os.write(theirs, b'c')

    try:
        with pytest.raises(Cancelled), frozen(ticker, timeout=30, also=ours, check=check, at=at):
            pass
    finally:
        os.close(ours)
        os.close(theirs)
    assert not is_frozen(cgroup)


def test_an_exception_undoes_all(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker, _stranger = tick(children=1), tick()

    def fail(point: str) -> None:
        if point == 'let-run-freeze-done':
            raise ZeroDivisionError

    def dump() -> None:
        with frozen(ticker, at=fail) as held:
            seize(held)
            held.let_run()

    with pytest.raises(ZeroDivisionError):
        dump()
    assert ticker.runs(1)
    assert list(cgroup.glob('*/')) == []


@pytest.mark.parametrize('point', ['freeze-move', 'let-run-freeze', 'undo-move', 'undo-freeze', 'undo-make'])
def test_an_error_at_a_step_undoes_all(cgroup: Path, tick: Tick, journal: Journal, point: str) -> None:
    ticker, _stranger = tick(children=1), tick()

    def fail(here: str) -> None:
        if here == point:
            raise OSError(errno.EIO, 'fault')

    def dump() -> None:
        with freeze(ticker.scan(), ticker.target, 'cgroup', time.monotonic() + 5, journal, ticker.scan,
                    at=fail) as held:
            seize(held)
            held.let_run()
            held.hold()

    with pytest.raises((CkptError, OSError), match='fault'):
        dump()
    # a step whose undoing failed is left to a recovery, the others are undone
    assert [entry.alive for entry in journal.entries()] == [False] * point.startswith('undo-')
    recover(journal)
    assert cgroups_of(ticker.pids) == [name_of(cgroup)] * 2
    assert list(cgroup.glob('*/')) == []
    assert ticker.runs(1)


def test_tree_that_dies_while_frozen(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker, stranger = tick(children=2), tick()
    with frozen(ticker):
        for pid in ticker.pids:
            os.kill(pid, 9)
    assert stranger.runs()
    assert list(cgroup.glob('*/')) == []


def test_threaded_cgroup_is_left_to_ptrace(cgroup: Path, nest: Nest, tick: Tick, frozen: Freeze) -> None:
    below = nest('threads')
    (below / 'cgroup.type').write_text('threaded')
    ticker, stranger = tick(how='threads'), tick()
    (below / 'cgroup.threads').write_text(str(ticker.scan().threads(ticker.pid)[1].tid))
    with pytest.raises(NotSupported, match='threaded'), frozen(ticker):
        pass
    with frozen(ticker, 'auto') as held:
        assert held.mode == 'ptrace'
        assert ticker.stands_still(3)
        assert stranger.runs()
    assert ticker.runs()


def test_caller_mode_refuses_a_running_tree(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker = tick(children=2)
    with pytest.raises(NotFrozen) as caught, frozen(ticker, 'caller'):
        pass
    assert [(row.pid, row.errno) for row in caught.value.refusals] == [(pid, 'EBUSY') for pid in ticker.pids]
    assert not is_frozen(cgroup)


def test_caller_mode_takes_a_frozen_tree(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker = tick(children=1)
    set_frozen(cgroup, True)
    before = ticker.counts(2)
    with frozen(ticker, 'caller') as held:
        seize(held)
        held.let_run()
    assert ticker.counts(2) == before
    assert is_frozen(cgroup)
    set_frozen(cgroup, False)
    assert ticker.runs()


def test_caller_mode_takes_a_stopped_tree(tick: Tick, frozen: Freeze) -> None:
    ticker = tick()
    os.kill(ticker.pid, 19)
    assert os.waitpid(ticker.pid, os.WUNTRACED)[0] == ticker.pid
    with frozen(ticker, 'caller') as held:
        seize(held)
        held.let_run()
        held.restore()
    # detached it goes from its ptrace stop to the group stop by itself, and tells nobody
    assert ticker.comes_to('T')
    assert ticker.stands_still()
    os.kill(ticker.pid, 18)
    assert ticker.runs()


def test_own_tree_is_refused(journal: Journal) -> None:
    def scan() -> Any:
        return scan_tree((os.getpid(),))

    target = ResolvedTarget((os.getpid(),), None, None, 'ourselves')
    with pytest.raises(InvalidArgument), freeze(scan(), target, 'auto', time.monotonic() + 1, journal, scan):
        pass


class Units:
    """Freezes a cgroup as systemd would, and tells the order."""

    def __init__(self, path: Path) -> None:
        self.path, self.calls = path, []

    def freeze(self, unit: str) -> None:
        self.calls.append(f'freeze {unit}')
        set_frozen(self.path, True)

    def thaw(self, unit: str) -> None:
        self.calls.append(f'thaw {unit}')
        set_frozen(self.path, False)


@pytest.mark.parametrize('found', [False, True])
@pytest.mark.parametrize('mode', ['auto', 'unit'])
def test_unit_is_frozen_by_its_manager(cgroup: Path, tick: Tick, frozen: Freeze, mode: str, found: bool) -> None:
    ticker, units = tick(children=1), Units(cgroup)
    set_frozen(cgroup, found)
    target = ResolvedTarget((ticker.pid,), name_of(cgroup), 'x.service', 'unit x.service')
    with frozen(ticker, mode, target=target, freeze_unit=units.freeze, thaw_unit=units.thaw) as held:
        assert held.mode == 'unit'
        assert ticker.stands_still(2)
        before = ticker.counts(2)
        seize(held)
        held.let_run()
        held.restore()
        assert ticker.stands_still(2)
    if found:
        assert ticker.counts(2) == before
        assert units.calls == ['thaw x.service', 'freeze x.service']
        set_frozen(cgroup, False)
    else:
        assert units.calls == ['freeze x.service', 'thaw x.service']
    assert ticker.runs(1)


def test_unit_with_strangers_is_not_frozen(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    ticker, stranger, units = tick(), tick(), Units(cgroup)
    target = ResolvedTarget((ticker.pid,), name_of(cgroup), 'x.service', 'unit x.service')
    with pytest.raises(NotSupported), frozen(ticker, 'unit', target=target, freeze_unit=units.freeze,
                                             thaw_unit=units.thaw):
        pass
    with frozen(ticker, 'auto', target=target, freeze_unit=units.freeze, thaw_unit=units.thaw) as held:
        assert held.mode == 'cgroup'
        assert stranger.runs()
    assert units.calls == []


def test_manager_that_refuses_leaves_it_to_cgroup_freeze(cgroup: Path, tick: Tick, frozen: Freeze) -> None:
    def no(unit: str) -> None:
        raise CkptError(f'{unit}: no')

    ticker = tick()
    target = ResolvedTarget((ticker.pid,), name_of(cgroup), 'x.service', 'unit x.service')
    with frozen(ticker, 'auto', target=target, freeze_unit=no, thaw_unit=lambda unit: None) as held:
        assert held.mode == 'cgroup'
        assert is_frozen(cgroup)
    assert ticker.runs()

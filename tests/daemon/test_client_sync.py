# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd.client.sync on a real daemon: every method of the client without an event loop."""

import inspect
import os
import signal
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd import client
from ckptd.client import ImageAdded, ImageRemoved, JobNew, JobRemoved, Progress, Running, sync
from ckptd.client.sync import SyncCkptd, connect
from ckptd.errors import Cancelled, NoSuchImage, NoSuchTarget, Refused, Unavailable
from tests.daemon.conftest import start_sleeper
from tests.jobs.scripted import ScriptedDaemon
from tests.jobs.test_spool import write_image
from tests.lib.bus import Daemon
from tests.programs.conftest import await_that

pytestmark = pytest.mark.needs('dbus')
PATIENCE = 40       # seconds


@pytest.fixture
def ckptd(daemon: Daemon) -> Iterator[SyncCkptd]:
    with connect(daemon.address) as made:
        yield made


@pytest.fixture
def player(scripted: ScriptedDaemon) -> Iterator[SyncCkptd]:
    with connect(scripted.address) as made:
        yield made


def image_of(ckptd: SyncCkptd, spool: Path, scene: str) -> str:
    with ckptd.events(ImageAdded) as added:
        image = write_image(spool, os.getuid(), target=f'cgroup:/{scene}')
        assert next(added).image == image       # type: ignore[union-attr]
    return image


@pytest.mark.needs('root', 'ptrace')
def test_there_and_back(ckptd: SyncCkptd) -> None:
    with start_sleeper() as process:
        target = f'pid:{process.pid}'
        [task] = ckptd.scan(target)
        assert task.comm == 'sleep'
        assert all(row.severity == 'warning' for row in ckptd.check(target))
        assert ckptd.freeze(target) == 1
        assert ckptd.info().frozen_targets == (target,)
        ckptd.thaw(target)
        pidfd = os.pidfd_open(process.pid)
        job = ckptd.checkpoint_process(pidfd, after='kill')
        os.close(pidfd)
        told = list(job)
        assert isinstance(told[-1], Progress)
        result = job.wait(PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert (job.status().state, job.id, job.root) == ('done', 2, 0)
    [row] = ckptd.list_images()
    assert row.id == result.image
    again = ckptd.restore(row.id, wait=True)
    assert next(event for event in again if isinstance(event, Running)).root == again.root == process.pid
    os.kill(again.root, signal.SIGTERM)
    assert again.wait(PATIENCE).exit_status == signal.SIGTERM


def test_an_image(ckptd: SyncCkptd, sleeper: str, tmp_path: Path) -> None:
    image = ckptd.image(ckptd.checkpoint(sleeper).wait(PATIENCE).image)
    assert image.path.endswith(image.id)
    assert (image.info().id, image.info().processes) == (image.id, 1)
    assert [task.comm for task in image.tree()] == ['sleep']
    assert image.verify() == []
    with (tmp_path / 'cores.tar').open('wb') as sink:
        image.export(sink.fileno())
    with tarfile.open(tmp_path / 'cores.tar') as tar:
        assert len(tar.getmembers()) == 1
    rows = image.check_restore()
    assert rows == ckptd.check_restore(image.id)
    assert 'EEXIST' in {row.errno for row in rows}      # it still runs
    with ckptd.events(ImageRemoved) as removed:
        image.remove()
        assert removed.next(PATIENCE) == ImageRemoved(image.id, image.path)
    with pytest.raises(NoSuchImage):
        ckptd.image(image.id)


def test_jobs(player: SyncCkptd) -> None:
    with player.events(JobNew, JobRemoved) as events:
        job = player.checkpoint('cgroup:/slow')
        assert events.next(PATIENCE) == JobNew(job.id, job.path)
        with pytest.raises(TimeoutError):
            job.wait(0.01)
        await_that('it works', lambda: [row.state for row in player.list_jobs()] == ['running'])
        [row] = player.list_jobs()
        same = player.job(row.id)
        assert same.path == job.path
        same.cancel()
        assert events.next(PATIENCE) == JobRemoved(job.id, job.path, 'cancelled')
        with pytest.raises(TimeoutError):
            events.next(0.01)
    for one in (same, job):
        with pytest.raises(Cancelled):
            one.wait(PATIENCE)
    with pytest.raises(Refused) as caught:
        player.checkpoint('cgroup:/refuse').wait(PATIENCE)
    assert len(caught.value.refusals) == 2
    with pytest.raises(NoSuchTarget):
        player.checkpoint('pid:4194305')


def test_a_restore_by_the_image(player: SyncCkptd, spool: Path) -> None:
    assert player.image(image_of(player, spool, 'restore')).restore().wait(PATIENCE).root == 4242


def test_threads_share_a_connection(player: SyncCkptd) -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(player.checkpoint('cgroup:/finish').wait(PATIENCE).tasks))
    thread.start()
    assert player.list_images() == []
    thread.join()
    assert results == [2]


async def test_within_a_loop_of_somebody_else(scripted: ScriptedDaemon) -> None:
    with connect(scripted.address) as ckptd:
        assert ckptd.list_jobs() == []


def test_no_daemon(scripted: ScriptedDaemon, tmp_path: Path) -> None:
    with pytest.raises(Unavailable), connect(f'unix:path={tmp_path}/none'):
        pass
    with connect(scripted.address) as ckptd:
        job = ckptd.checkpoint('cgroup:/slow')
        scripted.process.kill()
        with pytest.raises(Unavailable):
            job.wait(PATIENCE)
        with pytest.raises(Unavailable):
            ckptd.info()


@pytest.mark.parametrize('name', ['SyncCkptd', 'SyncJob', 'SyncImage', 'SyncEvents'])
def test_it_has_all_that_the_other_has(name: str) -> None:
    """By the same names, with the same parameters."""
    theirs, ours = getattr(client, name.removeprefix('Sync')), getattr(sync, name)
    told = {'hear', 'left', 'lost', 'settle', 'abandon', 'forget', 'close'}      # between parts of the client
    for member, value in inspect.getmembers(theirs, inspect.isfunction):
        if member.startswith('_') or member in told:
            continue
        expected, found = inspect.signature(value).parameters, inspect.signature(getattr(ours, member)).parameters
        assert list(found)[:len(expected)] == list(expected), member
        assert set(found) - set(expected) <= {'timeout'}, member

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deaths in the middle of a dump, as the daemon has to deal with them: nothing stays frozen, nothing is left."""

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.bus.client import connect
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from ckptd.bus.wire import make_call
from ckptd.errors import Busy, Cancelled, WorkerDied
from tests.daemon.test_api import Api, api_of
from tests.daemon.test_daemon import frozen
from tests.lib.bus import Daemon, family, read_line

pytestmark = pytest.mark.needs('cgroup2', 'ptrace')


class Paused:
    """A daemon whose worker stands still at a fault point, deaf, with its target frozen."""

    def __init__(self, start: Callable[..., Daemon], tmp_path: Path, sleeper: int) -> None:
        self.sleeper, self._fifo, self._start = sleeper, tmp_path / 'paused', start
        os.mkfifo(self._fifo)

    def start(self, point: str) -> None:
        self.daemon = self._start(env={'CKPTD_FAULT': f'{point}=pause', 'CKPTD_FAULT_FILE': str(self._fifo)})

    def begin(self) -> None:
        """A checkpoint, until its tree is frozen."""
        with self.reached():
            self.daemon.call('Checkpoint', 'sa{sv}', f'pid:{self.sleeper}', '1', 'detach', 'b', 'true')
        assert frozen(self.sleeper)

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """What is done inside brings the worker to its point."""
        fd = os.open(self._fifo, os.O_RDWR)     # also a writer: no end-of-file before the worker writes
        try:
            yield
            assert read_line(fd, 20)
        finally:
            os.close(fd)

    @property
    def worker(self) -> int:
        """That has the journal's entry open."""
        [pid] = [pid for pid in family(self.daemon.pid) for fd in Path(f'/proc/{pid}/fd').iterdir()
                 if '/freezes/' in str(fd.readlink())]
        return pid

    def assert_clean(self) -> None:
        assert not frozen(self.sleeper)
        assert 'TracerPid:\t0' in Path(f'/proc/{self.sleeper}/status').read_text()
        assert list(self.daemon.spool.iterdir()) == []
        assert list((self.daemon.runtime / 'freezes').iterdir()) == []


@pytest.fixture
def paused(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Paused]:
    with subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        yield Paused(start_daemon, tmp_path, process.pid)
        process.kill()


async def test_kill_9_of_the_worker(paused: Paused) -> None:
    paused.start('frozen')
    async with api_of(paused.daemon) as api:
        paused.begin()
        os.kill(paused.worker, signal.SIGKILL)
        error = (await api.ended('/org/ckptd1/job/1'))['Error']
    assert error['name'].endswith(WorkerDied.name)
    assert 'killed by SIGKILL' in error['message']
    paused.assert_clean()


def test_kill_9_of_both_and_the_next_start(paused: Paused, start_daemon: Callable[..., Daemon]) -> None:
    paused.start('frozen')
    paused.begin()
    pids = [os.pidfd_open(pid) for pid in family(paused.daemon.pid)]
    worker = paused.worker
    paused.daemon.process.kill()
    os.kill(worker, signal.SIGKILL)
    for pidfd in pids:
        assert select.select([pidfd], [], [], 20)[0]
        os.close(pidfd)
    assert frozen(paused.sleeper), 'what is to be shown has not happened'
    again = start_daemon()
    paused.assert_clean()
    assert again.call('ListImages') == [[]]


async def test_a_tree_at_work_is_busy(paused: Paused) -> None:
    paused.start('frozen')
    async with api_of(paused.daemon) as api:
        paused.begin()
        for member in ('Checkpoint', 'Freeze'):
            with pytest.raises(Busy, match='job 1'):
                await api(member, 'sa{sv}', f'pid:{paused.sleeper}', {})
        with pytest.raises(Busy, match='job 1'):
            await api('Checkpoint', 'sa{sv}', f'pid:{os.getpid()}', {})
        os.kill(paused.worker, signal.SIGKILL)      # it would not hear that it is to end
        await api.ended('/org/ckptd1/job/1')


async def test_cancel_of_a_worker_that_hangs(paused: Paused) -> None:
    paused.start('frozen')
    async with api_of(paused.daemon) as api:
        paused.begin()
        await cancel(api)
        shown = await api.ended('/org/ckptd1/job/1')
    assert (shown['State'], shown['Error']['name']) == ('cancelled', Cancelled('').dbus_name)
    paused.assert_clean()


async def test_a_client_that_leaves_while_it_waits_for_freeze(paused: Paused) -> None:
    """Nobody would know of the freeze: it is undone. The worker of this test is deaf, so it takes a kill."""
    paused.start('freeze-move-done')
    async with api_of(paused.daemon) as watcher:
        with paused.reached():
            client = await connect(paused.daemon.address)
            body = [f'pid:{paused.sleeper}', {}]
            client.connection.send(make_call(BUS_NAME, ROOT, MANAGER, 'Freeze', 'sa{sv}', body))
            await client.connection.drain()
        await client.close()
        shown = await watcher.ended('/org/ckptd1/job/1')
    assert (shown['State'], shown['Operation']) == ('cancelled', 'freeze')
    paused.assert_clean()


async def cancel(api: Api) -> None:
    await api('Cancel', 'a{sv}', {}, path='/org/ckptd1/job/1', interface='org.ckptd1.Job')

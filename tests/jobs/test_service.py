# SPDX-License-Identifier: LGPL-2.1-or-later
"""Workers that somebody else starts: here a stand-in that does it as systemd would; tests/system has the real one."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ckptd.config import Config
from ckptd.errors import CkptError, NotSupported, WorkerDied
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.queue import Queue
from ckptd.jobs.quota import Quota
from ckptd.jobs.recovery import Recovery
from ckptd.jobs.service import Service
from ckptd.jobs.spool import Spool
from ckptd.jobs.state import State
from tests.jobs.conftest import PLAYER, Heard, request_of


class Manager:
    """Services. refuses: it starts nothing. stillborn: what it starts has ended when its pid is asked for."""

    def __init__(self, *, refuses: bool = False, stillborn: bool = False) -> None:
        self.services: list[Service] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.started = asyncio.Event()
        self.may_start = asyncio.Event()
        self.may_start.set()
        self._refuses, self._stillborn = refuses, stillborn

    async def start_service(self, service: Service) -> None:
        self.started.set()
        await self.may_start.wait()
        if self._refuses:
            raise CkptError('the manager is shutting down')
        self.services.append(service)
        self._run(service)

    def _run(self, service: Service) -> None:
        command = ['false'] if self._stillborn else service.command
        self.processes[service.unit] = subprocess.Popen(command, stdin=service.stdin,
                                                        env={**os.environ, **service.environment})
        if self._stillborn:
            self.processes[service.unit].wait()

    async def main_pid(self, unit: str) -> int:
        return 0 if self._stillborn else self.processes[unit].pid

    async def exit_status(self, unit: str) -> int:
        return self.processes.pop(unit).wait()


@pytest.fixture
async def queue_of(heard: Heard, spool: Path, tmp_path: Path) -> AsyncIterator[Callable[[Manager], Queue]]:
    made: list[Queue] = []

    def make(manager: Manager) -> Queue:
        pool = WorkerPool(PLAYER, manager)
        recovery = Recovery(tmp_path / 'runtime', Spool(spool), None, pool)
        made.append(Queue(Config(), pool, recovery, None, heard, Quota(Config(), Spool(spool))))
        return made[-1]

    yield make
    for queue in made:
        await queue.stop()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_restores_are_done_by_services_and_nothing_else_is(queue_of: Callable[[Manager], Queue],
                                                                 heard: Heard) -> None:
    manager = Manager()
    queue = queue_of(manager)
    job = queue.submit(request_of('restore', 'restore', image='the_image'))
    await heard.wait('done', 1)
    assert job.root == 4242
    await queue.call(request_of('rows', 'check-restore'))
    await queue.call(request_of('rows', 'scan'))
    first, second = manager.services
    assert first.description == 'Restore of the_image'
    assert first.unit != second.unit
    assert first.command == (*PLAYER, '0')
    # the daemon's settings, and nothing of its unit's
    assert {name.partition('_')[0] for name in first.environment} <= {'PYTHONPATH', 'CKPTD'}
    await queue.stop()
    assert manager.processes == {}


async def test_a_dump_that_is_too_much_for_the_sandbox(queue_of: Callable[[Manager], Queue]) -> None:
    """It begins again with a worker outside, which gets the same pidfd."""
    manager = Manager()
    pidfd = os.pidfd_open(os.getpid())
    try:
        result = await queue_of(manager).call(request_of('confined', 'check'), [pidfd])
    finally:
        os.close(pidfd)
    [service] = manager.services
    assert service.description == 'Check of cgroup:/confined'
    assert result['worker'] in result['avoid']
    assert 'pidfd' in result['pidfd']


async def test_cancel_after_the_move(queue_of: Callable[[Manager], Queue], heard: Heard) -> None:
    queue = queue_of(Manager())
    queue.submit(request_of('confined_late'))
    await heard.wait('memory', 1)
    queue.cancel(1)
    await heard.wait('cancelled', 1)


async def test_cancel_during_the_move(queue_of: Callable[[Manager], Queue], heard: Heard) -> None:
    manager = Manager()
    manager.may_start.clear()
    queue = queue_of(manager)
    queue.submit(request_of('confined_late'))
    await manager.started.wait()
    queue.cancel(1)
    manager.may_start.set()
    await heard.wait('cancelled', 1)


async def test_no_worker_outside_can_be_started(queue_of: Callable[[Manager], Queue]) -> None:
    with pytest.raises(NotSupported, match='cannot start a worker'):
        await queue_of(Manager(refuses=True)).call(request_of('confined', 'check'))


async def test_one_that_is_killed_is_heard_of(queue_of: Callable[[Manager], Queue], heard: Heard) -> None:
    queue = queue_of(Manager())
    job = queue.submit(request_of('attend', 'restore', wait=True))
    await heard.wait('attend', 1)
    os.kill(job.worker, signal.SIGKILL)
    await heard.wait('failed', 1)
    assert 'was killed by SIGKILL; the tree may run on' in str(job.error)


async def test_a_deaf_one_is_ended_by_force(queue_of: Callable[[Manager], Queue], heard: Heard,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('ckptd.jobs.queue.CANCEL_PATIENCE', 0.1)
    queue = queue_of(Manager())
    queue.submit(request_of('deaf', 'restore'))
    await heard.wait('memory', 1)
    queue.cancel(1)
    await heard.wait('cancelled', 1)


@pytest.mark.parametrize(('how', 'words'), [('refuses', 'cannot start a worker: the manager is shutting down'),
                                            ('stillborn', 'exited with status 1 before it began')])
async def test_one_that_cannot_be_started(queue_of: Callable[[Manager], Queue], how: str, words: str) -> None:
    with pytest.raises(WorkerDied, match=words) as caught:
        await queue_of(Manager(**{how: True})).call(request_of('rows', 'check-restore'))
    assert 'journalctl -u ckptd-restore-' in caught.value.hint


async def test_cancel_while_it_is_started(queue_of: Callable[[Manager], Queue], heard: Heard) -> None:
    manager = Manager()
    manager.may_start.clear()
    queue = queue_of(manager)
    job = queue.submit(request_of('restore', 'restore'))
    await manager.started.wait()
    queue.cancel(1)
    assert job.state is State.CANCELLED
    manager.may_start.set()
    await queue.stop()
    assert manager.processes == {}

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process that starts workers."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ckptd.errors import WorkerDied
from ckptd.jobs.spawner import SpawnerClient
from ckptd.jobs.worker import ChildWorker, environment
from ckptd.kernel.liveness import Liveness
from ckptd.kernel.pidfd import wait_dead
from ckptd.protocol.messages import Failed, Start
from ckptd.protocol.requests import Caller, VerifyRequest
from tests.programs.conftest import await_that

ALONE = ['/dev/null', '/dev/null', 'anon_inode:', 'socket:']       # its epoll and its socket
FOLLOWING = [*ALONE[:2], 'anon_inode:', *ALONE[2:]]                 # and the daemon's pidfd


@pytest.fixture
async def spawner() -> AsyncIterator[SpawnerClient]:
    made = SpawnerClient(environment())
    yield made
    made.close()


def kinds(pid: int) -> list[str]:
    """What is open in a process besides standard error, '/dev/null', 'socket:' or 'anon_inode:'."""
    links = []
    for path in Path(f'/proc/{pid}/fd').iterdir():
        with suppress(FileNotFoundError):       # closed meanwhile
            links += [path.readlink()] if path.name != '2' else []
    return sorted(str(link).partition('[')[0].replace('pidfd:', 'anon_inode:') for link in links)


async def test_a_worker(spawner: SpawnerClient) -> None:
    """A process of its own, in a session of its own, with nothing open but these; it does what it is asked."""
    worker = await ChildWorker.start(spawner)
    await asyncio.to_thread(await_that, 'its session', lambda: os.getsid(worker.pid) == worker.pid, 10)
    await asyncio.to_thread(await_that, 'these alone', lambda: kinds(worker.pid) == ALONE, 10)
    worker.send(Start(VerifyRequest(caller=Caller(0, 0), spool='/nowhere', runtime='/nowhere', image='none')))
    message = await worker.receive()
    assert isinstance(message, Failed)
    assert await worker.end(10) == message.error().exit_status
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_many_at_once(spawner: SpawnerClient) -> None:
    workers = await asyncio.gather(*(ChildWorker.start(spawner) for _ in range(20)))
    assert len({worker.pid for worker in workers}) == 20
    workers[0].kill()
    assert await asyncio.gather(*(worker.end(10) for worker in workers)) == [-signal.SIGKILL] + [0] * 19


async def test_a_program_that_is_none(spawner: SpawnerClient, tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match='No such file'):
        await ChildWorker.start(spawner, (str(tmp_path / 'none'),))
    worker = await ChildWorker.start(spawner, (sys.executable, '-c', 'raise SystemExit(3)'))
    assert await worker.end(10) == 3


async def test_it_dies(spawner: SpawnerClient) -> None:
    """Its workers go on, how they end is not known, and the next one has another spawner."""
    worker, first = await ChildWorker.start(spawner), spawner.pid
    os.kill(first, signal.SIGKILL)
    async with asyncio.timeout(10):
        while (other := await start_or_fail(spawner)) is None:
            pass
    assert spawner.pid != first
    assert await other.end(10) == 0
    assert worker.describe(await worker.end(10)) == 'ended with an unknown status'


async def test_they_end_with_their_witness() -> None:
    """Spawner, and worker at work or not, although their sockets stay open: a daemon's, of which a thread hangs."""
    liveness = Liveness()
    if liveness.pidfd < 0:
        liveness.close()
        pytest.skip('needs PIDFD_THREAD (Linux 6.9)')
    spawner = SpawnerClient(environment(), liveness.pidfd)
    worker = await ChildWorker.start(spawner)
    with open_pidfds(spawner.pid, worker.pid) as pidfds:
        await asyncio.to_thread(await_that, 'it has the pidfd', lambda: kinds(worker.pid) == FOLLOWING, 10)
        assert not any(wait_dead(pidfd, 0) for pidfd in pidfds)
        liveness.close()
        assert all([await asyncio.to_thread(wait_dead, pidfd, 10) for pidfd in pidfds])
    await worker.end(0.1)       # how it has ended the spawner may not have lived to tell
    spawner.close()
    await asyncio.get_running_loop().shutdown_default_executor()


@contextmanager
def open_pidfds(*pids: int) -> Iterator[list[int]]:
    pidfds = [os.pidfd_open(pid) for pid in pids]
    yield pidfds
    for pidfd in pidfds:
        os.close(pidfd)


async def start_or_fail(spawner: SpawnerClient) -> ChildWorker | None:
    """Its death is heard of by the first who wants something of it."""
    try:
        return await ChildWorker.start(spawner)
    except WorkerDied:
        return None


async def test_who_does_not_wait_for_the_start(spawner: SpawnerClient) -> None:
    await (await ChildWorker.start(spawner)).end(10)
    before = set(os.listdir('/proc/self/fd'))       # noqa: PTH208 - numbers
    task = asyncio.create_task(ChildWorker.start(spawner))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await (await ChildWorker.start(spawner)).end(10)
    assert set(os.listdir('/proc/self/fd')) == before       # noqa: PTH208

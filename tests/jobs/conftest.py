# SPDX-License-Identifier: LGPL-2.1-or-later
"""A queue whose workers play scenes (player.py), and a listener that remembers what it heard."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from ckptd.config import Config
from ckptd.jobs.inhibitors import InhibitorLock
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.queue import Queue
from ckptd.jobs.quota import Quota
from ckptd.jobs.recovery import Recovery
from ckptd.jobs.run import Units
from ckptd.jobs.spool import Spool
from ckptd.jobs.state import JobRecord
from ckptd.protocol.requests import Caller, Request
from ckptd.target import CgroupTarget
from tests.lib.requests import make_request

PLAYER = (sys.executable, str(Path(__file__).with_name('player.py')))


def request_of(scene: str, operation: str = 'checkpoint', uid: int = 0, **more: object) -> Request:
    target = CgroupTarget(f'/{scene}')
    return make_request(operation, {
        'caller': Caller(uid, uid), 'spool': '/nowhere', 'runtime': '/nowhere', 'target': target, 'dumped': str(target),
        'image': '', 'format': 'tar', 'size_limit': 1 << 30}, **more)


class Heard:
    """A listener. events: (what, number of the job or 0) in order; progress: (loop time, progress)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.progress: list[tuple[float, float]] = []
        self.prepared: list[tuple[int, bool, list[str]]] = []
        self.restored: list[tuple[int, int]] = []
        self._phases: dict[int, str] = {}
        self._more = asyncio.Event()

    def _add(self, what: str, number: int) -> None:
        self.events.append((what, number))
        self._more.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something was heard after which the condition holds."""
        async with asyncio.timeout(20):
            while not condition():
                self._more.clear()
                await self._more.wait()

    async def wait(self, what: str, number: int = 0) -> None:
        await self.until(lambda: (what, number) in self.events)

    def job_new(self, job: JobRecord) -> None:
        self._add('new', job.number)

    def job_changed(self, job: JobRecord) -> None:
        if self._phases.get(job.number, '') != job.phase:
            self._phases[job.number] = job.phase
            self._add(job.phase, job.number)

    def job_progress(self, job: JobRecord) -> None:
        self.progress.append((asyncio.get_running_loop().time(), job.progress))

    def job_removed(self, job: JobRecord) -> None:
        self._add(job.state.value, job.number)

    def job_forgotten(self, job: JobRecord) -> None:
        self._add('forgotten', job.number)

    def job_prepares(self, job: JobRecord, start: bool, inhibitors: Sequence[InhibitorLock]) -> None:
        self.prepared.append((job.number, start, [one.who for one in inhibitors]))
        self._more.set()

    def tree_restored(self, job: JobRecord, tasks: int) -> None:
        self.restored.append((job.number, tasks))

    def frozen_changed(self, uid: int) -> None:
        self._add('frozen', 0)

    async def images_changed(self) -> None:
        self._add('images', 0)


@pytest.fixture
def doomed() -> Iterator['subprocess.Popen[bytes]']:
    """A process that a test kills."""
    with subprocess.Popen(['sleep', '60']) as process:
        yield process
        process.kill()


@pytest.fixture
async def heard() -> Heard:
    return Heard()


@pytest.fixture
async def make_queue(heard: Heard, spool: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Queue]]:
    """Queues of this test, stopped at its end."""
    made: list[Queue] = []

    def make(units: Units | None = None, **settings: object) -> Queue:
        pool = WorkerPool(PLAYER)
        recovery = Recovery(tmp_path / 'runtime', Spool(spool), units, pool)
        config = Config(**settings)
        made.append(Queue(config, pool, recovery, units, heard, Quota(config, Spool(spool))))
        return made[-1]

    yield make
    for queue in made:
        await queue.stop()
    await asyncio.get_running_loop().shutdown_default_executor()


@pytest.fixture
async def queue(make_queue: Callable[..., Queue]) -> Queue:
    return make_queue()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a dead worker has left is recovered even where somebody else has its locks for a while."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.image.writer import Incoming
from ckptd.jobs.queue import Queue
from ckptd.jobs.state import State
from ckptd.journal import Journal
from tests.jobs.conftest import Heard, request_of
from tests.lib.brood import Brood

IMAGE = '20260131_120000_x_0000'


class Holder:
    """A process that has the locks of what job 1 has left."""

    def __init__(self, runtime: Path, spool: Path, brood: Brood) -> None:
        self.runtime, self.spool = runtime, spool
        self.pid = brood.fork(self._hold)

    def _hold(self) -> None:
        self.kept = Journal(self.runtime).begin(1, 'x', 'cgroup'), Incoming(self.spool, IMAGE)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    @property
    def left(self) -> list[str]:
        return [path.name for path in (*(self.runtime / 'freezes').iterdir(), *self.spool.iterdir())]


@pytest.fixture
def holder(tmp_path: Path, spool: Path) -> Iterator[Holder]:
    with Brood() as brood:
        yield Holder(tmp_path / 'runtime', spool, brood)


async def test_a_lock_that_is_freed_soon_delays_the_end_of_the_job(queue: Queue, heard: Heard, holder: Holder) -> None:
    job = queue.submit(request_of('die', image=IMAGE))
    await heard.wait('memory', 1)
    asyncio.get_running_loop().call_later(0.5, holder.end)
    await heard.until(lambda: job.over)
    assert job.state is State.FAILED
    assert holder.left == []


async def test_a_lock_that_is_freed_late(queue: Queue, heard: Heard, holder: Holder) -> None:
    job = queue.submit(request_of('die', image=IMAGE))
    await heard.until(lambda: job.over)
    assert len(holder.left) == 2
    assert not queue.idle
    holder.end()
    await asyncio.wait(queue._recovery.waiting, timeout=20)
    assert holder.left == []
    assert not queue._recovery.waiting


async def test_a_lock_that_an_earlier_daemon_has_left(queue: Queue, holder: Holder) -> None:
    async with asyncio.timeout(10):
        await queue.start()         # which is not kept waiting
    assert len(holder.left) == 2
    holder.end()
    await asyncio.wait(queue._recovery.waiting, timeout=20)
    assert holder.left == []


async def test_what_a_worker_has_that_lives_is_left_alone(queue: Queue, heard: Heard, holder: Holder) -> None:
    at_work = queue.submit(request_of('slow', image=IMAGE))
    await heard.wait('memory', 1)
    dies = queue.submit(request_of('die'))
    await heard.until(lambda: dies.over)
    assert not queue._recovery._locked
    queue.cancel(at_work.number)
    await heard.until(lambda: at_work.over)


async def test_a_daemon_that_stops_waits_for_no_lock(make_queue: Callable[..., Queue], holder: Holder) -> None:
    queue = make_queue()
    await queue.start()
    assert queue._recovery.waiting
    async with asyncio.timeout(5):
        await queue.stop()
    assert not queue._recovery.waiting

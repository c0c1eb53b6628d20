# SPDX-License-Identifier: LGPL-2.1-or-later
"""A checkpoint waits for who delays it, and not for ever; a job that nobody wants any more is told so."""

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest

from ckptd.errors import LimitsExceeded, NoSuchTarget
from ckptd.jobs.inhibitors import MOST_OF_USER, InhibitorLock, Inhibitors
from ckptd.jobs.queue import Queue
from ckptd.jobs.state import State
from ckptd.kernel.stat import read_stat
from ckptd.target import CgroupTarget, ProcessTarget, Target
from tests.jobs.conftest import Heard, request_of


@pytest.fixture
async def inhibitors() -> AsyncIterator[Inhibitors]:
    made = Inhibitors()
    yield made
    made.close()


A = CgroupTarget('/a')


def take(inhibitors: Inhibitors, target: Target = A, uid: int = 1000, start_time: int = 0) -> int:
    return inhibitors.take(InhibitorLock('who', 'why', target, uid, 42, ':1.7'), start_time)


async def test_it_is_held_until_the_last_has_closed_it(inhibitors: Inhibitors) -> None:
    fd = take(inhibitors)
    [one] = inhibitors.of(CgroupTarget('/a/b'))
    assert inhibitors.of(CgroupTarget('/c')) == []
    other = os.dup(fd)
    os.close(fd)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(inhibitors) == 1
    os.close(other)
    async with asyncio.timeout(10):
        await one.released.wait()
    assert len(inhibitors) == 0


async def test_who_writes_has_let_go(inhibitors: Inhibitors) -> None:
    fd = take(inhibitors)
    [one] = inhibitors.held
    os.write(fd, b'what is this for?')
    async with asyncio.timeout(10):
        await one.released.wait()
    os.close(fd)


async def test_it_ends_with_the_process_that_it_is_about(inhibitors: Inhibitors,
                                                         doomed: 'subprocess.Popen[bytes]') -> None:
    """Else it would delay whoever gets the number next."""
    fd = take(inhibitors, ProcessTarget(doomed.pid), start_time=read_stat(doomed.pid).start_time)
    [one] = inhibitors.held
    doomed.kill()
    async with asyncio.timeout(10):
        await one.released.wait()
    assert len(inhibitors) == 0
    with pytest.raises(NoSuchTarget):
        take(inhibitors, ProcessTarget(1), start_time=read_stat(1).start_time + 1)
    with pytest.raises(NoSuchTarget):
        take(inhibitors, ProcessTarget(4194305))
    assert len(inhibitors) == 0
    os.close(fd)


async def test_waiting_is_bounded(inhibitors: Inhibitors) -> None:
    fd = take(inhibitors)
    start = time.monotonic()
    await inhibitors.wait(inhibitors.held, 0.2)
    assert time.monotonic() - start >= 0.2
    assert len(inhibitors) == 1
    os.close(fd)


async def test_limits(inhibitors: Inhibitors) -> None:
    fds = [take(inhibitors) for _ in range(MOST_OF_USER)]
    with pytest.raises(LimitsExceeded, match='too many inhibitors: uid 1000 has 32'):
        take(inhibitors)
    fds += [take(inhibitors, uid=0) for _ in range(MOST_OF_USER + 1)]
    for fd in fds:
        os.close(fd)


async def test_a_checkpoint_waits_for_it(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(inhibit_delay_usec=60_000_000, max_jobs=1)
    fd = take(queue.inhibitors, CgroupTarget('/finish'))
    job = queue.submit(request_of('finish'))
    await heard.wait('prepare', 1)
    assert heard.prepared == [(1, True, ['who'])]
    assert (job.state, job.phase, job.worker) == (State.QUEUED, 'prepare', 0)
    # it has no place meanwhile: others work
    assert await queue.call(request_of('rows', 'scan')) is not None
    queue.submit(request_of('rows', 'verify'))
    await heard.wait('done', 2)
    os.close(fd)
    await heard.wait('done', 1)
    assert heard.prepared[-1] == (1, False, ['who'])      # it may begin again
    assert not queue.idle           # it may still be asked about


async def test_it_delays_no_longer_than_configured(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(inhibit_delay_usec=100_000)
    fd = take(queue.inhibitors, CgroupTarget('/finish'))
    queue.submit(request_of('finish'))
    await heard.wait('done', 1)
    assert [start for _, start, _ in heard.prepared] == [True, False]
    os.close(fd)


async def test_cancel_while_it_waits(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(inhibit_delay_usec=60_000_000)
    fd = take(queue.inhibitors, CgroupTarget('/finish'))
    queue.submit(request_of('finish'))
    await heard.wait('prepare', 1)
    queue.cancel(1)
    assert ('cancelled', 1) in heard.events
    assert heard.prepared[-1] == (1, False, ['who'])
    os.close(fd)


async def test_what_is_called_when_a_job_is_over(queue: Queue, heard: Heard) -> None:
    job = queue.submit(request_of('finish'))
    over: list[str] = []
    queue.when_over(job, lambda: over.append('later'))
    await heard.wait('done', 1)
    queue.when_over(job, lambda: over.append('at once'))
    with suppress(TimeoutError):
        await heard.until(lambda: over == ['later', 'at once'])
    assert over == ['later', 'at once']

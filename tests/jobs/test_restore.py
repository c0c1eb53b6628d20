# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs that restore: what TreeRuns changes, and who waits for the end of the tree."""

import os
import signal
from collections.abc import Callable

import pytest

from ckptd.errors import Cancelled, LimitsExceeded, WorkerDied
from ckptd.jobs import queue as queue_module
from ckptd.jobs.queue import Queue
from ckptd.jobs.state import JobRecord, State
from tests.jobs.conftest import Heard, request_of

IMAGE = '20240131_235959_a_0001'


def restore(queue: Queue, scene: str, **more: object) -> JobRecord:
    return queue.submit(request_of(scene, 'restore', image=IMAGE, **more))


async def test_a_tree_that_is_not_waited_for(queue: Queue, heard: Heard) -> None:
    job = restore(queue, 'restore')
    assert queue.works_on(IMAGE)
    await heard.wait('done', 1)
    assert (job.root, job.progress, job.result['tasks']) == (4242, 1.0, 2)
    # no image came or went
    assert heard.events == [('new', 1), ('fill', 1), ('start', 1), ('done', 1)]
    assert not queue.works_on(IMAGE)


async def test_the_same_tree_may_be_asked_for_twice(queue: Queue, heard: Heard) -> None:
    """Pids decide, and the second may want a pid namespace of its own."""
    restore(queue, 'restore')
    restore(queue, 'restore')
    await heard.wait('done', 1)
    await heard.wait('done', 2)


async def test_who_attends_is_out_of_the_lane_and_needs_no_image(make_queue: Callable[..., Queue],
                                                                 heard: Heard) -> None:
    queue = make_queue(max_jobs=1)
    reader, writer = os.pipe()
    try:
        job = queue.submit(request_of('watch', 'restore', image=IMAGE, wait=True), [reader])
        await heard.wait('attend', 1)
        assert (job.state, job.root, job.progress) == (State.RUNNING, 4242, 1.0)
        assert not queue.works_on(IMAGE)
        restore(queue, 'restore')
        await heard.wait('done', 2)
        assert job.state is State.RUNNING
        os.write(writer, b'.')
        await heard.wait('done', 1)
    finally:
        os.close(reader)
        os.close(writer)
    assert os.waitstatus_to_exitcode(job.result['exit_status']) == 3


async def test_cancel_lets_go_of_a_tree_that_runs(queue: Queue, heard: Heard) -> None:
    job = restore(queue, 'attend', wait=True)
    await heard.wait('attend', 1)
    queue.cancel(1)
    await heard.wait('done', 1)
    assert job.result == {'root': 4242}


async def test_a_daemon_that_stops_lets_go_of_it(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue()
    job = restore(queue, 'attend', wait=True)
    await heard.wait('attend', 1)
    await queue.stop()
    assert job.state is State.DONE


async def test_a_worker_that_dies_before_and_after_the_tree_runs(queue: Queue, heard: Heard) -> None:
    early, late = restore(queue, 'die'), restore(queue, 'desert', wait=True)
    await heard.wait('failed', early.number)
    await heard.wait('failed', late.number)
    assert isinstance(early.error, WorkerDied)
    assert isinstance(late.error, WorkerDied)
    assert 'nothing of the tree is left' in early.error.hint
    assert late.error.message == 'the worker of job 2 was killed by SIGKILL; the tree may run on, as process 4242'
    assert 'ckptctl tree 4242' in late.error.hint


async def test_cancel_before_it_runs_by_force(queue: Queue, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, 'CANCEL_PATIENCE', 0.1)
    job = restore(queue, 'deaf')
    await heard.wait('memory', 1)
    queue.cancel(1)
    await heard.wait('cancelled', 1)
    assert isinstance(job.error, Cancelled)


async def test_an_attended_tree_counts_as_a_job_of_its_user(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(max_jobs_per_user=1)
    job = restore(queue, 'attend', wait=True, uid=1000)
    await heard.wait('attend', 1)
    with pytest.raises(LimitsExceeded, match='has 1 jobs'):
        restore(queue, 'restore', uid=1000)
    os.kill(job.worker, signal.SIGKILL)
    await heard.wait('failed', 1)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs from asking to end, with real worker processes that play scenes."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from ckptd.config import Config
from ckptd.errors import (
    Busy,
    Cancelled,
    CkptError,
    InvalidArgument,
    LimitsExceeded,
    NoSuchJob,
    NoSuchTarget,
    Refused,
    Unavailable,
    WorkerDied,
)
from ckptd.jobs import by_number, entry, worker
from ckptd.jobs import queue as queue_module
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.queue import Queue
from ckptd.jobs.quota import Quota
from ckptd.jobs.spool import Spool
from ckptd.jobs.state import JobRecord, State
from ckptd.jobs.worker import ChildWorker
from ckptd.kernel.stat import read_stat
from ckptd.protocol.requests import UnitFacts
from ckptd.target import CgroupTarget, ProcessTarget
from tests.jobs.conftest import Heard, request_of


async def run(queue: Queue, heard: Heard, scene: str, **more: object) -> JobRecord:
    """Submit and wait for the end."""
    job = queue.submit(request_of(scene, **more))
    await heard.until(lambda: job.over)
    return job


async def test_a_job_is_announced_works_and_ends(queue: Queue, heard: Heard) -> None:
    job = await run(queue, heard, 'finish', image='the_image')
    assert (job.number, job.state, job.progress) == (1, State.DONE, 1.0)
    assert job.result['image'] == 'the_image'
    # the image is on the bus before the job is said to be over
    assert heard.events == [('new', 1), ('scan', 1), ('memory', 1), ('images', 0), ('done', 1)]
    assert heard.progress[-1][1] == 1.0


async def test_no_worker_may_be_in_a_tree(queue: Queue, heard: Heard) -> None:
    job = await run(queue, heard, 'finish', avoid=(17,))
    assert {17, job.worker} <= set(job.result['avoid'])


async def test_numbers_count_announced_jobs_from_1(queue: Queue, heard: Heard) -> None:
    assert (await queue.call(request_of('rows', 'scan')))['count'] == 3
    first, second = await run(queue, heard, 'finish'), await run(queue, heard, 'finish')
    assert [first.number, second.number] == [1, 2] == [job.number for job in queue.jobs]


async def test_a_long_result_comes_in_pieces(queue: Queue) -> None:
    result = await queue.call(request_of('rows', 'scan'))
    assert result == {'tasks': [{'tid': 1}, {'tid': 2}, {'tid': 3}], 'count': 3}


async def test_an_error_keeps_all_it_says(queue: Queue) -> None:
    with pytest.raises(Refused) as caught:
        await queue.call(request_of('refuse', 'check'))
    assert (caught.value.task, caught.value.phase, len(caught.value.refusals)) == (7, 'scan', 2)


async def test_a_killed_worker(queue: Queue, heard: Heard) -> None:
    job = await run(queue, heard, 'die')
    assert job.state is State.FAILED
    assert isinstance(job.error, WorkerDied)
    assert (job.error.message, job.error.phase) == ('the worker of job 1 was killed by SIGKILL', 'memory')


@pytest.mark.parametrize(('scene', 'message'), [('leave', 'exited with status 4'), ('babble', 'the worker of')])
async def test_a_worker_that_breaks_the_protocol(queue: Queue, scene: str, message: str) -> None:
    with pytest.raises(WorkerDied, match=message):
        await queue.call(request_of(scene, 'scan'))


async def test_cancel_lets_the_worker_let_go(queue: Queue, heard: Heard) -> None:
    job = queue.submit(request_of('slow'))
    await heard.wait('memory', 1)
    queue.cancel(1)
    await heard.wait('cancelled', 1)
    assert isinstance(job.error, Cancelled)
    assert job.error.message == 'as you wish'
    queue.cancel(1)     # of a job that is over: nothing
    with pytest.raises(NoSuchJob):
        queue.cancel(2)


async def test_cancel_that_comes_too_late(queue: Queue, heard: Heard) -> None:
    """The worker was done, and never read it."""
    job = queue.submit(request_of('hasty'))
    await heard.wait('memory', 1)
    queue.cancel(1)
    await heard.wait('done', 1)
    assert job.result == {'tasks': 1}


async def test_cancel_of_a_deaf_worker_kills_it(queue: Queue, heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, 'CANCEL_PATIENCE', 0.1)
    job = queue.submit(request_of('deaf'))
    await heard.wait('memory', 1)
    queue.cancel(1)
    await heard.wait('cancelled', 1)
    assert 'did not end and was killed' in str(job.error)


async def test_cancel_of_a_job_that_waits(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(max_jobs=1)
    queue.submit(request_of('slow'))
    await heard.wait('memory', 1)
    waiting = queue.submit(request_of('finish'))
    assert waiting.state is State.QUEUED
    queue.cancel(2)
    assert waiting.state is State.CANCELLED
    await asyncio.sleep(0)
    assert waiting.name not in {task.get_name() for task in asyncio.all_tasks()}
    # the other lane is free
    assert (await queue.call(request_of('rows', 'scan')))['count'] == 3


async def test_a_caller_that_leaves_cancels_its_call(queue: Queue, heard: Heard) -> None:
    task = asyncio.create_task(queue.call(request_of('slow', 'freeze')))
    await heard.wait('memory', 1)
    task.cancel()
    await heard.wait('cancelled', 1)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_as_many_at_once_as_configured(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(max_jobs=2)
    jobs = [queue.submit(request_of('slow', 'verify')) for _ in range(3)]
    await heard.wait('memory', 1)
    await heard.wait('memory', 2)
    assert jobs[2].state is State.QUEUED
    queue.cancel(1)
    await heard.wait('memory', 3)
    assert [job.state for job in jobs] == [State.CANCELLED, State.RUNNING, State.RUNNING]


async def test_streams_of_one_user_hold_up_nobody_else(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(max_jobs=2)
    jobs = [queue.submit(request_of('slow', 'export', uid=uid)) for uid in (1000, 1000, 1001, 1002)]
    for number in (1, 3, 4):
        await heard.wait('memory', number)
    assert jobs[1].state is State.QUEUED


async def test_who_says_nothing_for_long_keeps_nobody_from_work(
        make_queue: Callable[..., Queue], heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a file system, say, that is a program of its user's."""
    monkeypatch.setattr(entry, 'SILENCE', 0.2)
    queue = make_queue(max_jobs=1)
    silent = queue.submit(request_of('slow', 'verify', uid=1000))
    queue.submit(request_of('finish', 'verify', uid=1001))
    await heard.wait('done', 2)
    assert silent.state is State.RUNNING


async def test_what_is_written_counts(make_queue: Callable[..., Queue], heard: Heard) -> None:
    """Also what is not yet published: two that would fit alone do not fit together. Root has no limit."""
    queue = make_queue(max_bytes_per_user=150, max_jobs=8)
    for number, uid in enumerate((1000, 1001, 0, 0, 1000), 1):
        queue.submit(request_of(f'grow/{number}', uid=uid))
    await heard.until(lambda: any(what == 'failed' for what, _ in heard.events))
    states = {job.number: job.state for job in queue.jobs}
    [failed] = [job for job in queue.jobs if job.state is State.FAILED]
    assert failed.number in (1, 5)
    assert isinstance(failed.error, LimitsExceeded)
    assert 'would have 200 bytes' in str(failed.error)
    assert sum(state is State.FAILED for state in states.values()) == 1


async def test_the_image_that_is_one_too_many_is_not_begun(make_queue: Callable[..., Queue], heard: Heard,
                                                         spool: Path) -> None:
    config = Config(max_images=2)
    quota = Quota(config, Spool(spool))
    for number in (1, 2):
        assert quota.room(1000) > 0
        quota.begin(JobRecord(number, request_of('grow', uid=1000 + number), 0))
    with pytest.raises(LimitsExceeded, match='has 2 images'):
        quota.room(1000)
    assert quota.room(0) > 0


async def test_only_so_many_jobs_of_a_user_are_known_when_they_are_over(
        make_queue: Callable[..., Queue], heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who starts and cancels all day fills no table."""
    monkeypatch.setattr(by_number, 'MOST_OVER', 3)
    queue = make_queue(max_jobs=1)
    queue.submit(request_of('finish', 'verify'))
    await heard.wait('done', 1)
    for number in range(2, 8):
        queue.submit(request_of('slow', 'verify', uid=1000))
        queue.cancel(number)
    assert [job.number for job in queue.jobs] == [1, 5, 6, 7]
    assert [number for what, number in heard.events if what == 'forgotten'] == [2, 3, 4]
    with pytest.raises(NoSuchJob):
        queue.cancel(2)


async def test_a_listener_that_fails_leaves_no_job(queue: Queue, heard: Heard, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    monkeypatch.setattr(heard, 'job_new', lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        queue.submit(request_of('slow'))
    assert queue.idle
    monkeypatch.undo()
    queue.submit(request_of('slow'))
    await heard.wait('memory', 2)


async def test_a_worker_that_does_not_even_end_by_sigkill(make_queue: Callable[..., Queue], heard: Heard,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for a file of its user's: the job is over, others go on, and it counts until it has ended."""
    monkeypatch.setattr(queue_module, 'CANCEL_PATIENCE', 0.1)
    for module in (worker, entry):
        monkeypatch.setattr(module, 'LAST_PATIENCE', 0.1)
    monkeypatch.setattr(ChildWorker, 'kill', lambda self: None)
    monkeypatch.setattr(WorkerPool.give_back, '__defaults__', (0.1,))
    queue = make_queue(max_jobs=1, max_jobs_per_user=1)
    job = queue.submit(request_of('deaf', 'verify', uid=1000))
    await heard.wait('memory', 1)
    queue.cancel(1)
    await heard.wait('cancelled', 1)
    queue.submit(request_of('finish', 'verify', uid=1001))
    await heard.wait('done', 2)
    with pytest.raises(LimitsExceeded):
        queue.submit(request_of('finish', 'verify', uid=1000))
    monkeypatch.undo()
    os.kill(job.worker, signal.SIGKILL)
    async with asyncio.timeout(20):
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name().startswith('end of worker')))
    queue.submit(request_of('finish', 'verify', uid=1000))
    await heard.wait('done', 3)


async def test_two_jobs_on_one_target(queue: Queue, heard: Heard) -> None:
    queue.submit(request_of('slow'))
    with pytest.raises(Busy, match='job 1 works on cgroup:/slow'):
        queue.submit(request_of('slow'))
    with pytest.raises(Busy):
        await queue.call(request_of('slow', 'freeze'))
    await heard.wait('memory', 1)


async def test_limit_of_a_user_but_not_of_root(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(max_jobs_per_user=1)
    queue.submit(request_of('slow', 'verify', uid=1000))
    with pytest.raises(LimitsExceeded):
        queue.submit(request_of('slow', 'verify', uid=1000))
    queue.submit(request_of('finish', 'verify', uid=1001))
    queue.submit(request_of('finish', 'verify'))
    queue.submit(request_of('finish', 'verify'))
    await heard.wait('memory', 1)


async def test_a_token_is_taken_once(queue: Queue, heard: Heard) -> None:
    queue.submit(request_of('finish'), token='/job/1_2_mine')
    with pytest.raises(InvalidArgument, match='handle_token'):
        queue.submit(request_of('rows'), token='/job/1_2_mine')
    await heard.wait('done', 1)


async def test_freeze_holds_until_thaw(queue: Queue, heard: Heard) -> None:
    target = CgroupTarget('/hold')
    assert await queue.call(request_of('hold', 'freeze', uid=1000)) == {'tasks': 3}
    assert queue.frozen == {target: 1000}
    with pytest.raises(Busy, match='held frozen already'):
        await queue.call(request_of('hold', 'freeze'))
    await queue.thaw(target)
    assert queue.frozen == {}
    with pytest.raises(NoSuchTarget, match='is not frozen'):
        await queue.thaw(target)


async def test_a_freeze_ends_with_the_process_that_was_named(
        queue: Queue, heard: Heard, monkeypatch: pytest.MonkeyPatch, doomed: 'subprocess.Popen[bytes]') -> None:
    """Its number will be another's."""
    monkeypatch.setenv('PLAYER_SCENE', 'hold')
    target, start_time = ProcessTarget(doomed.pid), read_stat(doomed.pid).start_time
    request = msgspec.structs.replace(request_of('hold', 'freeze'), target=target, start_time=start_time)
    await queue.call(request)
    assert list(queue.frozen) == [target]
    doomed.kill()
    await heard.until(lambda: not queue.frozen)


async def test_a_checkpoint_may_leave_its_tree_frozen(queue: Queue, heard: Heard) -> None:
    job = await run(queue, heard, 'hold', after='freeze')
    assert job.state is State.DONE
    assert list(queue.frozen) == [CgroupTarget('/hold')]
    await queue.thaw(CgroupTarget('/hold'))


async def test_a_check_holds_no_freeze(queue: Queue) -> None:
    """A user's worker may say what it likes."""
    assert await queue.call(request_of('claim', 'check')) == {'refusals': []}
    assert not queue.frozen


async def test_a_holder_that_is_killed(queue: Queue, heard: Heard) -> None:
    job = await run(queue, heard, 'hold', after='freeze')
    os.kill(job.worker, signal.SIGKILL)
    await heard.until(lambda: not queue.frozen)


async def test_thaw_tells_of_a_holder_that_dies(queue: Queue, heard: Heard) -> None:
    await run(queue, heard, 'drop', after='freeze')
    with pytest.raises(WorkerDied, match='SIGKILL'):
        await queue.thaw(CgroupTarget('/drop'))


async def test_progress_ten_times_a_second_and_the_last(queue: Queue, heard: Heard) -> None:
    await run(queue, heard, 'many')
    times = [when for when, _ in heard.progress]
    # the first, perhaps one on time, and the last; a thousand were said
    assert len(times) <= 2 + 10 * (times[-1] - times[0])
    assert heard.progress[-1][1] == 1.0


class Units:
    """A systemd that refuses everything."""

    async def freeze(self, unit: str, timeout: float) -> None:  # noqa: ASYNC109 - as Units has it
        raise CkptError(f'{unit} is masked')

    async def thaw(self, unit: str) -> None:
        raise CkptError(f'{unit} is masked')

    async def stop(self, unit: str, timeout: float) -> bool:  # noqa: ASYNC109 - as Units has it
        raise CkptError(f'{unit} is masked')

    async def await_stop(self, unit: str) -> None:
        raise CkptError(f'{unit} is masked')

    async def await_end(self, unit: str) -> None:
        raise CkptError(f'{unit} is masked')

    async def facts(self, unit: str) -> UnitFacts:
        raise CkptError(f'{unit} is masked')

    async def scope(self, scope: str, pids: Sequence[int], description: str, slice_: str = '') -> None:
        raise CkptError(f'{scope} of {list(pids)} cannot be made')


async def test_units_are_asked_of_systemd(make_queue: Callable[..., Queue]) -> None:
    assert (await make_queue(Units()).call(request_of('unit', 'check')))['error'] == 'a.service is masked'
    scope = (await make_queue(Units()).call(request_of('scope', 'check')))['error']
    assert scope == 'a.scope of [1, 2] cannot be made'
    for scene in ('unit', 'scope'):
        assert 'no systemd' in (await make_queue().call(request_of(scene, 'check')))['error']


async def test_fds_go_along(queue: Queue, tmp_path: Path) -> None:
    path = tmp_path / 'output'
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        await queue.call(request_of('write', 'export'), [fd])
    finally:
        os.close(fd)
    assert path.read_bytes() == b'written by the worker'


async def test_a_job_is_forgotten_after_a_while(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue(keep_jobs_usec=1000)
    await run(queue, heard, 'finish')
    await heard.wait('forgotten', 1)
    assert queue.jobs == []


async def test_stop_ends_everything(make_queue: Callable[..., Queue], heard: Heard) -> None:
    queue = make_queue()
    slow, held = queue.submit(request_of('slow')), queue.submit(request_of('hold', after='freeze'))
    await heard.wait('done', held.number)
    await heard.wait('memory', slow.number)
    await queue.stop()
    assert slow.state is State.CANCELLED
    assert queue.frozen == {}
    with pytest.raises(Unavailable):
        queue.submit(request_of('finish'))

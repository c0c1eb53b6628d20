# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd.client on a real daemon: every method of the client with an event loop."""

import asyncio
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from ckptd.bus.client import ReceivedSignal
from ckptd.bus.names import MANAGER, ROOT, job_path
from ckptd.bus.options import AFTER, CHANGED_FILES, CHECK_RESTORE, CHECKPOINT, FREEZE, FREEZING, RESTORE
from ckptd.client import (
    CheckpointResult,
    Ckptd,
    ImageAdded,
    ImageRemoved,
    JobNew,
    JobRemoved,
    PrepareForCheckpoint,
    Progress,
    Running,
    connect,
    records,
)
from ckptd.client.events import event_of
from ckptd.client.hub import KEPT, Events, Hub
from ckptd.client.job import Job
from ckptd.errors import (
    Busy,
    Cancelled,
    InvalidArgument,
    NoSuchImage,
    NoSuchJob,
    NoSuchTarget,
    Refused,
    Unavailable,
)
from tests.daemon.conftest import daemon_on, image_of, start_sleeper
from tests.jobs.scripted import ScriptedDaemon
from tests.lib.bus import Daemon, PrivateBus

pytestmark = pytest.mark.needs('dbus')


# ---------------------------------------------------------------- jobs

async def test_a_checkpoint(ckptd: Ckptd, sleeper: str, daemon: Daemon) -> None:
    job = await ckptd.checkpoint(sleeper, freeze='auto', after='resume', timeout=5_000_000)
    assert job.id == 1
    events = [event async for event in job]
    assert events
    assert isinstance(events[-1], Progress)
    assert (events[-1].job, events[-1].progress) == (job.path, 1.0)
    result = await job.wait()
    assert (result.target, result.command, result.tasks, result.processes) == (sleeper, 'sleep', 1, 1)
    assert 0 < result.frozen_time < result.total_time
    assert (daemon.spool / result.image / 'manifest.json').exists()
    assert result == await job.wait()
    status = await job.status()
    assert (status.state, status.operation, status.image, status.started_by_uid) == (
        'done', 'checkpoint', result.image, os.getuid())
    [row] = await ckptd.list_jobs()
    assert (row.id, row.path, row.operation, row.target, row.state) == (1, job.path, 'checkpoint', sleeper, 'done')


async def test_a_checkpoint_of_a_pidfd(ckptd: Ckptd, sleeper: str) -> None:
    pidfd = os.pidfd_open(int(sleeper.removeprefix('pid:')))
    try:
        assert (await (await ckptd.checkpoint_process(pidfd)).wait()).target == sleeper
    finally:
        os.close(pidfd)


async def test_many_jobs_and_who_reads_late(ckptd: Ckptd) -> None:
    """Each job hears its own signals, also those of before anybody asked."""
    sleepers = [start_sleeper() for _ in range(4)]
    try:
        jobs = await asyncio.gather(*[ckptd.checkpoint(f'pid:{one.pid}') for one in sleepers])
        results = await asyncio.gather(*[job.wait() for job in jobs])
        assert [result.target for result in results] == [f'pid:{one.pid}' for one in sleepers]
        for job in jobs:
            told = [event async for event in job]
            assert {event.job for event in told} == {job.path}
        assert sorted(job.id for job in jobs) == [1, 2, 3, 4]
    finally:
        for one in sleepers:
            one.kill()
            one.wait()


@pytest.mark.needs('root', 'ptrace')
async def test_a_restore(ckptd: Ckptd) -> None:
    with start_sleeper() as process:
        result = await (await ckptd.checkpoint(f'pid:{process.pid}', after='kill')).wait()
    assert process.returncode == -signal.SIGKILL
    assert [row for row in await ckptd.check_restore(result.image) if row.severity == 'refusal'] == []
    job = await ckptd.restore(result.image, wait=True)
    running = [event async for event in _until_running(job)]
    assert running[-1] == Running(job.path, process.pid)
    os.kill(job.root, signal.SIGTERM)
    restored = await job.wait()
    assert (restored.image, restored.root, restored.tasks) == (result.image, process.pid, 1)
    assert restored.exit_status is not None
    assert os.waitstatus_to_exitcode(restored.exit_status) == -signal.SIGTERM


async def _until_running(job: Any) -> AsyncIterator[Any]:
    async for event in job:
        yield event
        if isinstance(event, Running):
            return


async def test_a_scripted_restore(player: Ckptd, spool: Path) -> None:
    image = await player.image(await image_of(player, spool, 'restore'))
    job = await image.restore(changed_files='accept', cgroup='/a', handle_token='mine')
    assert job.path.endswith('_mine')
    assert [event async for event in job if isinstance(event, Running)] == [Running(job.path, 4242)]
    result = await job.wait()
    assert (result.image, result.root, result.tasks, result.exit_status) == (image.id, 4242, 2, None)
    assert job.root == 4242


async def test_a_restore_that_is_let_go_of(player: Ckptd, spool: Path) -> None:
    job = await player.restore(await image_of(player, spool, 'attend'), wait=True)
    assert [event.root async for event in _until_running(job) if isinstance(event, Running)] == [4242]
    await job.cancel()
    assert (await job.wait()).exit_status is None


async def test_a_terminal_is_passed_along(scripted: ScriptedDaemon, player: Ckptd, spool: Path) -> None:
    image = await image_of(player, spool, 'obstacles')
    master, slave = os.openpty()
    try:
        rows = await player.check_restore(image, terminal=slave, wait=True)
        assert rows[0].reason.endswith('on its terminal')
    finally:
        os.close(master)
        os.close(slave)


async def test_what_stands_in_the_way_of_a_restore(player: Ckptd, spool: Path) -> None:
    image = await player.image(await image_of(player, spool, 'obstacles'))
    rows = await image.check_restore(new_pidns=True)
    assert rows == await player.check_restore(image.id)
    assert [(row.resource, row.errno, row.severity) for row in rows] == [
        ('pid 7', 'EEXIST', 'refusal'), ('pid 8', 'EEXIST', 'warning')]


async def test_a_job_that_is_cancelled(player: Ckptd) -> None:
    job = await player.checkpoint('cgroup:/slow')
    await job.cancel()
    with pytest.raises(Cancelled):
        await job.wait()
    await job.cancel()
    assert (await job.status()).state == 'cancelled'


async def test_a_job_that_is_refused_has_every_reason(player: Ckptd) -> None:
    job = await player.checkpoint('cgroup:/refuse')
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            await job.wait()
        assert [row.reason for row in caught.value.refusals] == ['is a socket'] * 2
        assert caught.value.phase == 'scan'


@pytest.mark.parametrize('born', [True, False])
async def test_a_call_that_is_interrupted_takes_its_job_back(player: Ckptd, monkeypatch: pytest.MonkeyPatch,
                                                             born: bool) -> None:
    """Before the job exists, and after that but before the call is answered."""
    connection = player._daemon.client.connection
    send, deliver = connection.send, connection._deliver

    def sent(message: Any, fds: Any = ()) -> None:
        send(message, fds)
        if message.member == 'Checkpoint' and not born:
            call.cancel()

    def delivered(message: Any) -> None:
        deliver(message)
        if message.member == 'JobNew' and born:
            call.cancel()

    monkeypatch.setattr(connection, 'send', sent)
    monkeypatch.setattr(connection, '_deliver', delivered)
    async with player.events(JobRemoved) as events:
        call = asyncio.ensure_future(player.checkpoint('cgroup:/slow'))
        with pytest.raises(asyncio.CancelledError):
            await call
        ended = await anext(events)
    assert isinstance(ended, JobRemoved)
    assert ended.result == 'cancelled'
    assert not player._listening._hub._subscribers    # type: ignore[union-attr]


async def test_a_job_of_the_list(player: Ckptd, scripted: ScriptedDaemon) -> None:
    """Whoever started it; one that works, and one that is over."""
    job = await player.checkpoint('cgroup:/slow')
    async with connect(scripted.address) as other:
        same = await other.job(job.id)
        assert same.path == job.path
        await same.cancel()
        for one in (same, job, await other.job(job.id)):
            with pytest.raises(Cancelled):
                await one.wait()
        done = await (await player.checkpoint('cgroup:/finish')).wait()
        [row] = [row for row in await other.list_jobs() if row.target == 'cgroup:/finish']
        assert await (await other.job(row.id)).wait() == done
        assert isinstance(done, CheckpointResult)
        with pytest.raises(NoSuchJob):
            await other.job(4711)


# ---------------------------------------------------------------- questions

async def test_scan_and_check(ckptd: Ckptd, sleeper: str) -> None:
    [task] = await ckptd.scan(sleeper)
    assert (f'pid:{task.tid}', task.comm, task.uid, task.depth) == (sleeper, 'sleep', os.getuid(), 0)
    assert task.fds[0] == '0 /dev/null'
    assert all(row.severity == 'warning' for row in await ckptd.check(sleeper, freeze='ptrace'))


async def test_freeze_and_thaw(ckptd: Ckptd, sleeper: str) -> None:
    assert await ckptd.freeze(sleeper, timeout=5_000_000) == 1
    assert (await ckptd.info()).frozen_targets == (sleeper,)
    with pytest.raises(Busy):
        await ckptd.freeze(sleeper)
    await ckptd.thaw(sleeper)
    assert (await ckptd.info()).frozen_targets == ()


async def test_images(ckptd: Ckptd, sleeper: str, daemon: Daemon, tmp_path: Path) -> None:
    result = await (await ckptd.checkpoint(sleeper)).wait()
    [row] = await ckptd.list_images()
    assert (row.id, row.target, row.command, row.owner, row.tasks) == (result.image, sleeper, 'sleep', os.getuid(), 1)
    image = await ckptd.image(result.image)
    assert (image.id, image.path) == (row.id, row.path)
    details = await image.info()
    assert (details.id, details.path, details.size, details.created) == (row.id, row.path, row.size, row.created)
    assert (details.processes, details.kernel) == (1, os.uname().release)
    assert details.statistics['frozen_time'] == result.frozen_time
    assert [task.comm for task in await image.tree()] == ['sleep']
    assert await image.verify() == []
    with (tmp_path / 'cores.tar').open('wb') as sink:
        await image.export(sink.fileno(), 'core')
        with pytest.raises(InvalidArgument, match='unknown format'):
            await image.export(sink.fileno(), 'coer')
    with tarfile.open(tmp_path / 'cores.tar') as tar:
        assert [member.name for member in tar] == [f'core.{sleeper.removeprefix("pid:")}']
    async with ckptd.events(ImageRemoved) as removed:
        await image.remove()
        assert await anext(removed) == ImageRemoved(image.id, image.path)
    assert await ckptd.list_images() == []
    for call in (image.verify, image.tree, lambda: ckptd.image(image.id)):
        with pytest.raises(NoSuchImage):
            await call()


async def test_the_daemon_itself(ckptd: Ckptd, daemon: Daemon) -> None:
    info = await ckptd.info()
    assert (info.spool, info.jobs, info.images) == (str(daemon.spool), 0, 0)
    assert info.version


async def test_errors(ckptd: Ckptd) -> None:
    for call, error in ((ckptd.checkpoint('pid:4194305'), NoSuchTarget), (ckptd.check('pid:4194305'), NoSuchTarget),
                        (ckptd.scan('/etc'), InvalidArgument), (ckptd.thaw('self'), NoSuchTarget),
                        (ckptd.restore('20240131_235959_sleep_3fa9'), NoSuchImage)):
        with pytest.raises(error) as caught:
            await call
        assert caught.value.hint
    assert not ckptd._listening._hub._subscribers    # type: ignore[union-attr]


# ---------------------------------------------------------------- events, and their end

async def test_events_in_their_order(ckptd: Ckptd, sleeper: str) -> None:
    async with ckptd.events() as every, ckptd.events(JobRemoved, JobNew) as some:
        job = await ckptd.checkpoint(sleeper)
        assert await anext(some) == JobNew(1, job.path)
        assert await anext(some) == JobRemoved(1, job.path, 'done')
        image = (await job.wait()).image
        seen = []
        async for event in every:
            seen.append(event)
            if isinstance(event, JobRemoved):
                break
    assert [type(event) for event in seen if not isinstance(event, Progress)] == [
        JobNew, PrepareForCheckpoint, ImageAdded, JobRemoved]
    assert [event.image for event in seen if isinstance(event, ImageAdded)] == [image]


async def test_a_daemon_that_dies(scripted: ScriptedDaemon) -> None:
    async with connect(scripted.address) as ckptd, ckptd.events() as events:
        job = await ckptd.checkpoint('cgroup:/slow')
        scripted.process.kill()
        scripted.process.wait()
        with pytest.raises(Unavailable, match='before the job was over'):
            await job.wait()
        assert isinstance([event async for event in job], list)     # it ends
        with pytest.raises(Unavailable):
            async for _ in events:
                pass
        with pytest.raises(Unavailable):
            await ckptd.checkpoint('cgroup:/slow')


async def test_a_daemon_that_is_started_again(private_bus: PrivateBus, tmp_path: Path) -> None:
    async with connect(private_bus.address) as ckptd:
        with pytest.raises(Unavailable):
            await ckptd.list_jobs()
        for _ in range(2):
            with daemon_on(private_bus, tmp_path, 'tests.jobs.scripted'):
                assert (await (await ckptd.checkpoint('cgroup:/finish')).wait()).tasks == 2
                async with ckptd.events(JobNew):
                    pass


async def test_a_client_that_closes(scripted: ScriptedDaemon) -> None:
    async with connect(scripted.address) as ckptd:
        job = await ckptd.checkpoint('cgroup:/slow')
    with pytest.raises(Unavailable, match='closed'):
        await job.wait()


async def test_no_bus(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match='cannot connect'):
        async with connect(f'unix:path={tmp_path}/none'):
            pass


def test_unread_events_are_bounded() -> None:
    events = Events()
    for number in range(KEPT + 5):
        events.hear(ReceivedSignal('/', MANAGER, 'JobNew', (number, '/a')))
    assert len(events._unread) == KEPT
    assert event_of(ReceivedSignal('/', MANAGER, 'JobNew', (1, '/a', 'of tomorrow'))) == JobNew(1, '/a')
    assert event_of(ReceivedSignal('/', MANAGER, 'JobNew', (1,))) is None
    assert event_of(ReceivedSignal('/', MANAGER, 'Unheard', (1,))) is None


@pytest.mark.parametrize('wanted', [True, False])
async def test_a_job_ends_with_its_daemon(wanted: bool) -> None:
    """The next one's of the same path is another: one that nobody wanted any more does not cancel it."""
    sent: list[Any] = []
    connection = SimpleNamespace(send=sent.append)
    hub, events, path = Hub(), Events(), job_path(7)
    job = Job(cast(Any, SimpleNamespace(client=SimpleNamespace(connection=connection))), hub, path, dict)
    hub.join(events)
    if not wanted:
        job.abandon()
    assert hub.left('it is gone') is not wanted
    hub.add(ReceivedSignal(ROOT, MANAGER, 'JobNew', (7, path)))
    if wanted:
        with pytest.raises(Unavailable, match='it is gone'):
            await job.wait()
    else:
        assert await anext(events) == JobNew(7, path)
    assert sent == []


# ---------------------------------------------------------------- what is written twice

@pytest.mark.parametrize(('typed', 'known'), [
    (records.CheckpointOptions, CHECKPOINT), (records.RestoreOptions, RESTORE),
    (records.CheckRestoreOptions, CHECK_RESTORE), (records.FreezeOptions, FREEZING)])
def test_options_are_those_of_the_daemon(typed: type, known: Any) -> None:
    assert set(typed.__optional_keys__) == {option.name for option in known}   # type: ignore[attr-defined]


def test_choices_are_those_of_the_daemon() -> None:
    for choices, option in ((records.FreezeMode, FREEZE), (records.After, AFTER),
                            (records.ChangedFiles, CHANGED_FILES)):
        assert option.wanted == f'one of {", ".join(get_args(choices))}'

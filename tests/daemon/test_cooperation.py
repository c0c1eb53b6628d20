# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs that end with their callers, inhibitors, images as streams: through the typed client."""

import asyncio
import os
import tarfile
from pathlib import Path

import pytest

from ckptd.client import Ckptd, JobRemoved, PrepareForCheckpoint, Restored, connect
from ckptd.errors import Cancelled, NoSuchImage
from tests.daemon.conftest import image_of
from tests.jobs.scripted import ScriptedDaemon
from tests.lib.bus import Daemon

pytestmark = pytest.mark.needs('dbus')


async def test_a_job_ends_with_its_caller(scripted: ScriptedDaemon, player: Ckptd) -> None:
    async with player.events(JobRemoved) as removed:
        async with connect(scripted.address) as other:
            await other.checkpoint('cgroup:/slow')
        async with asyncio.timeout(10):
            event = await anext(removed)
    assert isinstance(event, JobRemoved)
    assert event.result == 'cancelled'


async def test_a_detached_job_goes_on(scripted: ScriptedDaemon, player: Ckptd) -> None:
    async with connect(scripted.address) as other:
        number = (await other.checkpoint('cgroup:/slow', detach=True)).id
    job = await player.job(number)
    assert (await job.status()).state in ('queued', 'running')
    await job.cancel()
    with pytest.raises(Cancelled):
        await job.wait()


async def test_a_checkpoint_waits_for_an_inhibitor(ckptd: Ckptd, sleeper: str) -> None:
    async with ckptd.events(PrepareForCheckpoint) as events:
        with await ckptd.inhibit('a test', 'it wants to know', sleeper) as inhibitor:
            assert inhibitor.fileno() >= 0
            [row] = await ckptd.list_inhibitors()
            assert (row.who, row.why, row.target, row.uid, row.pid) == (
                'a test', 'it wants to know', sleeper, os.getuid(), os.getpid())
            job = await ckptd.checkpoint(sleeper)
            assert await anext(events) == PrepareForCheckpoint(job.path, True)
            assert (await job.status()).state in ('queued', 'running')
        assert inhibitor.fileno() == -1
        await job.wait()
        assert await anext(events) == PrepareForCheckpoint(job.path, False)
    assert await ckptd.list_inhibitors() == []


async def test_an_image_goes_out_and_comes_in(ckptd: Ckptd, sleeper: str, tmp_path: Path) -> None:
    image = await ckptd.image((await (await ckptd.checkpoint(sleeper)).wait()).image)
    with (tmp_path / 'image.tar').open('w+b') as file:
        await image.export(file.fileno(), 'tar')
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            assert 'manifest.json' in {Path(name).name for name in tar.getnames()}
        await image.remove()
        with pytest.raises(NoSuchImage):
            await image.verify()
        file.seek(0)
        again = await ckptd.import_image(file.fileno())
    assert await again.verify() == []
    assert [task.comm for task in await again.tree()] == ['sleep']


async def test_an_image_is_read_from_an_fd(ckptd: Ckptd, sleeper: str) -> None:
    image = await ckptd.image((await (await ckptd.checkpoint(sleeper)).wait()).image)
    fd = await image.open()

    def names() -> list[str]:
        with os.fdopen(fd, 'rb') as stream, tarfile.open(fileobj=stream, mode='r|') as tar:
            return tar.getnames()

    assert 'manifest.json' in {Path(name).name for name in await asyncio.to_thread(names)}
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_restored_is_told(player: Ckptd, spool: Path) -> None:
    image = await image_of(player, spool, 'restore')
    async with player.events(Restored) as events:
        await (await player.restore(image)).wait()
        async with asyncio.timeout(10):
            assert await anext(events) == Restored(image, 2)


def test_the_client_without_a_loop(daemon: Daemon, sleeper: str, tmp_path: Path) -> None:
    from ckptd.client import sync
    with sync.connect(daemon.address) as ckptd_:
        with ckptd_.inhibit('a test', 'to see it', sleeper):
            assert [row.who for row in ckptd_.list_inhibitors()] == ['a test']
        image = ckptd_.image(ckptd_.checkpoint(sleeper, detach=True).wait(30).image)
        with os.fdopen(image.open(), 'rb') as stream, (tmp_path / 'image.tar').open('w+b') as file:
            file.write(stream.read())
            file.seek(0)
            image.remove()
            assert ckptd_.import_image(file.fileno()).verify() == []

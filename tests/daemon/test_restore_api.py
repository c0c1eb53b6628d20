# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore and CheckRestore on a real bus: options, the terminal, the job's Root, and who may ask."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.bus.message import UnixFd
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, image_path, token_path
from ckptd.bus.options import CHECKPOINT, INHIBIT, RESTORE, TERMINAL, Option, parse_options
from ckptd.bus.wire import Variant
from ckptd.errors import Busy, InvalidArgument, NoSuchImage
from tests.daemon.test_api import Api, api_of
from tests.jobs.scripted import ScriptedDaemon
from tests.jobs.test_spool import write_image


@pytest.fixture
def scripted(tmp_path: Path, spool: Path) -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon(tmp_path, spool, env={'PLAYER_SCRIPT': 'tty; exit 3'}) as running:
        yield running


@pytest.fixture
async def api(scripted: ScriptedDaemon) -> AsyncIterator[Api]:
    async with api_of(scripted) as made:
        yield made
    await asyncio.get_running_loop().shutdown_default_executor()


async def image_of(api: Api, daemon: ScriptedDaemon, scene: str) -> str:
    """An image whose restore plays the scene, known to the daemon."""
    image = await asyncio.to_thread(write_image, daemon.spool, os.getuid(), target=f'cgroup:/{scene}')
    async with asyncio.timeout(20):
        async for signal in api.signals:
            if signal.member == 'ImageAdded' and signal.args[0] == image:
                return image
    raise AssertionError


async def property_becomes(api: Api, job: str, name: str, value: Any) -> None:
    async with asyncio.timeout(20):
        if await api.client.property_(BUS_NAME, job, JOB, name) == value:
            return
        async for signal in api.signals:
            if signal.path == job and signal.member == 'PropertiesChanged' and signal.args[1].get(name) == value:
                return


async def test_a_restore_from_call_to_result(api: Api, scripted: ScriptedDaemon) -> None:
    image = await image_of(api, scripted, 'restore')
    job = await api('Restore', 'sa{sv}', image, {'handle_token': 'mine', 'cgroup': '/a', 'changed_files': 'accept'})
    assert job == token_path(api.client.connection.unique_name, 'mine')
    shown = await api.ended(job)
    assert (shown['State'], shown['Operation'], shown['Image'], shown['Root']) == ('done', 'restore', image, 4242)
    assert shown['Result'] == {'image': image, 'root': 4242, 'tasks': 2}


async def test_root_is_told_while_the_tree_is_attended(api: Api, scripted: ScriptedDaemon) -> None:
    image = await image_of(api, scripted, 'attend')
    job = await api('Restore', 'a{sv}', {'wait': True}, path=image_path(image), interface=IMAGE)
    await property_becomes(api, job, 'Root', 4242)
    await property_becomes(api, job, 'Phase', 'attend')
    assert await api.client.property_(BUS_NAME, job, JOB, 'State') == 'running'
    await api('Cancel', 'a{sv}', {}, path=job, interface=JOB)
    assert (await api.ended(job))['State'] == 'done'


async def test_an_image_in_use_stays(api: Api, scripted: ScriptedDaemon) -> None:
    image = await image_of(api, scripted, 'slow')
    job = await api('Restore', 'sa{sv}', image, {})
    with pytest.raises(Busy, match='a job reads image'):
        await api('RemoveImage', 's', image)
    await api('Cancel', 'a{sv}', {}, path=job, interface=JOB)
    assert (await api.ended(job))['State'] == 'cancelled'
    await api('RemoveImage', 's', image)


@pytest.mark.parametrize('of_image', [False, True])
async def test_what_stands_in_the_way(api: Api, scripted: ScriptedDaemon, of_image: bool) -> None:
    image = await image_of(api, scripted, 'obstacles')
    if of_image:
        rows = await api('CheckRestore', 'a{sv}', {'new_pidns': True}, path=image_path(image), interface=IMAGE)
    else:
        rows = await api('CheckRestore', 'sa{sv}', image, {'wait': True})
    assert [(row['resource'], row['severity']) for row in rows] == [('pid 7', 'refusal'), ('pid 8', 'warning')]


async def test_a_terminal_goes_to_the_worker(api: Api, scripted: ScriptedDaemon) -> None:
    image = await image_of(api, scripted, 'program')
    master, slave = os.openpty()
    try:
        name = os.ttyname(slave)
        job = await api('Restore', 'sa{sv}', image, {'wait': True, 'terminal': UnixFd(slave)})
        os.close(slave)
        shown = await api.ended(job)
        assert os.waitstatus_to_exitcode(shown['Result']['exit_status']) == 3
        assert os.read(master, 100).decode() == f'{name}\r\n'
        with pytest.raises(OSError, match='Input/output error'):        # all other sides are closed
            os.read(master, 100)
    finally:
        os.close(master)


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({'cgroup': 'a'}, 'absolute path'), ({'cgroup': '/a/../b'}, 'without'), ({'cgroup': '/' + 'a' * 5000}, 'path'),
    ({'new_pidns': 'yes'}, 'true or false'), ({'wait': 1}, 'true or false'), ({'leave_stopped': 0}, 'true or false'),
    ({'changed_files': 'ignore'}, 'one of refuse, accept, rollback'), ({'terminal': 0}, 'descriptor of a terminal'),
    ({'terminal': '/dev/tty'}, 'descriptor of a terminal'), ({'after': 'kill'}, 'unknown option "after"'))


async def test_options_that_cannot_be(api: Api, scripted: ScriptedDaemon) -> None:
    image = await image_of(api, scripted, 'restore')
    reader, writer = os.pipe()
    try:
        for options, words in (*WRONG, ({'terminal': UnixFd(writer)}, 'descriptor of a terminal')):
            for member in ('Restore', 'CheckRestore'):
                with pytest.raises(InvalidArgument, match=words):
                    await api(member, 'sa{sv}', image, options)
    finally:
        os.close(reader)
        os.close(writer)
    assert await api('ListJobs') == []


async def test_a_file_descriptor_is_no_number(api: Api, sleeper: str) -> None:
    reader, writer = os.pipe()
    try:
        for options in ({'timeout': UnixFd(writer)}, {'save_limit': UnixFd(writer)}):
            with pytest.raises(InvalidArgument, match='must be a number'):
                await api('Checkpoint', 'sa{sv}', sleeper, options)
    finally:
        os.close(reader)
        os.close(writer)
    assert await api('ListJobs') == []


@pytest.mark.parametrize('option', [option for option in (*CHECKPOINT, *RESTORE, *INHIBIT) if option is not TERMINAL],
                         ids=lambda option: option.name)
def test_what_an_option_takes_can_be_sent_on(option: Option) -> None:
    """Whatever type a client writes into the variant."""
    for value in (True, 1, 1.0, 'auto', '/a', 'u', UnixFd(1), b'a', [], ['auto'], [1], (1,), {}, {'a': 1},
                  Variant('u', 1)):
        if option.accepts(value):
            for one in value if isinstance(value, list) else [value]:
                assert type(one) in (bool, int, str)


def test_a_number_is_no_file_descriptor() -> None:
    """Though the daemon may have a terminal open under it."""
    master, slave = os.openpty()
    try:
        with pytest.raises(InvalidArgument):
            parse_options({'terminal': slave}, RESTORE)
        assert parse_options({'terminal': UnixFd(slave)}, RESTORE) == {'terminal': slave}
    finally:
        os.close(master)
        os.close(slave)


async def test_an_image_that_is_not_there(api: Api) -> None:
    for member in ('Restore', 'CheckRestore'):
        with pytest.raises(NoSuchImage) as caught:
            await api(member, 'sa{sv}', '20240131_235959_sleep_3fa9', {})
        assert 'ckptctl list' in caught.value.hint

# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.ckptd1 on a real bus, as clients see it."""

import asyncio
import contextlib
import os
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.bus.client import Client, Signals, connect
from ckptd.bus.export import DOC
from ckptd.bus.interfaces import documents
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT, image_path, token_path
from ckptd.errors import Busy, CkptError, InvalidArgument, NoSuchImage, NoSuchTarget
from tests.jobs.test_spool import write_image
from tests.lib.bus import Daemon, Served

FILES = Path(__file__).parents[2] / 'dbus'
OBJECT_MANAGER = 'org.freedesktop.DBus.ObjectManager'


class Api:
    """Calls of the manager, and signals since the client came."""

    def __init__(self, client: Client, signals: Signals) -> None:
        self.client, self.signals = client, signals

    async def __call__(self, member: str, signature: str = '', *args: Any, path: str = ROOT,
                       interface: str = MANAGER) -> Any:
        return await self.client.call(BUS_NAME, path, interface, member, signature, *args)

    async def ended(self, job: str) -> dict[str, Any]:
        """The properties of a job that was waited for."""
        async with asyncio.timeout(30):
            async for signal in self.signals:
                if signal.member == 'JobRemoved' and signal.args[1] == job:
                    break
        return await self.client.properties(BUS_NAME, job, JOB)


@contextlib.asynccontextmanager
async def api_of(daemon: Daemon) -> AsyncIterator[Api]:
    async with await connect(daemon.address) as client, client.signals(BUS_NAME, ROOT) as signals:
        yield Api(client, signals)


@pytest.fixture
async def api(daemon: Daemon) -> AsyncIterator[Api]:
    async with api_of(daemon) as made:
        yield made


@pytest.fixture
def sleeper() -> Iterator[str]:
    """A target that does nothing."""
    with subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        yield f'pid:{process.pid}'
        process.kill()


@pytest.mark.parametrize('name', sorted(documents()))
def test_interface_files_are_what_the_classes_say(name: str) -> None:
    assert (FILES / name).read_text() == documents()[name], 'run: python -m ckptd.bus.interfaces dbus'


@pytest.mark.parametrize('name', sorted(documents()))
def test_everything_in_an_interface_file_says_what_it_is(name: str) -> None:
    [interface] = ElementTree.parse(FILES / name).getroot()
    members = [member for tag in ('method', 'signal', 'property') for member in interface.iter(tag)]
    silent = [member.get('name') for member in members
              if not [one for one in member.iter('annotation') if one.get('name') == DOC and one.get('value')]]
    assert len(members) > 10
    assert silent == []


def test_no_interface_file_without_a_class() -> None:
    assert {path.name for path in FILES.glob('*.xml')} == set(documents())


async def test_interface_files_are_what_the_daemon_answers(api: Api, sleeper: str) -> None:
    job = await api('Checkpoint', 'sa{sv}', sleeper, {})
    image = (await api.ended(job))['Image']
    for path, interface in ((ROOT, MANAGER), (job, JOB), (image_path(image), IMAGE)):
        answered = ElementTree.fromstring(
            await api('Introspect', path=path, interface='org.freedesktop.DBus.Introspectable'))
        [ours] = [node for node in answered if node.get('name') == interface]
        [filed] = ElementTree.parse(FILES / f'{interface}.xml').getroot()
        assert ElementTree.canonicalize(ElementTree.tostring(ours), strip_text=True) == ElementTree.canonicalize(
            ElementTree.tostring(filed), strip_text=True)


async def test_a_checkpoint_from_call_to_image(api: Api, sleeper: str, daemon: Daemon) -> None:
    token = token_path(api.client.connection.unique_name, 'mine')
    job = await api('Checkpoint', 'sa{sv}', sleeper, {'handle_token': 'mine'})
    assert job == token
    seen = []
    async with asyncio.timeout(30):
        async for signal in api.signals:
            seen.append(signal)
            if signal.member == 'JobRemoved':
                break
    order = [signal.member for signal in seen if signal.interface == MANAGER]
    assert order == ['JobNew', 'PrepareForCheckpoint', 'ImageAdded', 'JobRemoved']
    assert seen[-1].args == (1, job, 'done')
    progress = [signal.args for signal in seen if signal.member == 'Progress']
    assert progress[-1][1] == 1.0
    shown = await api.client.properties(BUS_NAME, job, JOB)
    assert (shown['State'], shown['Target'], shown['Operation'], shown['Error']) == ('done', sleeper, 'checkpoint', {})
    assert shown['Result']['image'] == shown['Image']
    assert (daemon.spool / shown['Image'] / 'manifest.json').exists()
    assert await api('ListJobs') == [[1, job, 'checkpoint', sleeper, 'done']]
    [row] = await api('ListImages')
    assert (row['image'], row['path'], row['owner']) == (shown['Image'], image_path(shown['Image']), os.getuid())
    path = await api('GetImage', 's', shown['Image'])
    assert await api('Verify', path=path, interface=IMAGE) == []
    [task] = await api('Tree', path=path, interface=IMAGE)
    assert task['comm'] == 'sleep'


async def test_a_pidfd_as_target(api: Api, sleeper: str) -> None:
    pidfd = os.pidfd_open(int(sleeper.removeprefix('pid:')))
    try:
        job = await api('CheckpointProcess', 'ha{sv}', pidfd, {})
        assert (await api.ended(job))['Target'] == sleeper
        with pytest.raises(InvalidArgument, match='not a pidfd'):
            await api('CheckpointProcess', 'ha{sv}', 0, {})
    finally:
        os.close(pidfd)


async def test_scan_and_check(api: Api, sleeper: str) -> None:
    [row] = await api('Scan', 'sa{sv}', sleeper, {})
    assert (row['comm'], f'pid:{row["tid"]}', row['uid']) == ('sleep', sleeper, os.getuid())
    assert all({'pid', 'comm', 'errno', 'reason', 'severity'} <= row.keys()
               for row in await api('Check', 'sa{sv}', sleeper, {}))


async def test_freeze_and_thaw(api: Api, sleeper: str) -> None:
    assert await api('Freeze', 'sa{sv}', sleeper, {}) == 1
    assert await api.client.property_(BUS_NAME, ROOT, MANAGER, 'FrozenTargets') == [sleeper]
    with pytest.raises(Busy):
        await api('Freeze', 'sa{sv}', sleeper, {})
    await api('Thaw', 'sa{sv}', sleeper, {})
    assert await api.client.property_(BUS_NAME, ROOT, MANAGER, 'FrozenTargets') == []


@pytest.mark.parametrize(('member', 'target', 'options', 'error'), [
    ('Checkpoint', 'pid:4194305', {}, NoSuchTarget), ('Check', 'pid:4194305', {}, NoSuchTarget),
    ('Checkpoint', '/etc', {}, InvalidArgument), ('Checkpoint', 'self', {'aftr': 'kill'}, InvalidArgument),
    ('Scan', 'self', {'freeze': 'auto'}, InvalidArgument), ('Thaw', 'self', {}, NoSuchTarget),
])
async def test_errors_have_names_and_hints(api: Api, member: str, target: str, options: dict[str, str],
                                           error: type[CkptError]) -> None:
    with pytest.raises(error) as caught:
        await api(member, 'sa{sv}', target, options)
    assert caught.value.hint


@pytest.mark.parametrize(('target', 'state'), [('cgroup:/finish', 'done'), ('cgroup:/refuse', 'failed')])
async def test_who_keeps_what_the_object_manager_tells(any_bus: str, tmp_path: Path, spool: Path, target: str,
                                                       state: str) -> None:
    """As a GDBusObjectManagerClient does: no job is called, and what is kept of it is right. Its progress is for those
    who ask."""
    with Served(any_bus, tmp_path, spool, module='tests.jobs.scripted'):
        async with await connect(any_bus) as keeper, await connect(any_bus) as starter, \
                keeper.signals(BUS_NAME, ROOT) as signals, asyncio.timeout(40):
            await keeper.call(BUS_NAME, ROOT, OBJECT_MANAGER, 'GetManagedObjects')
            job = await starter.call(BUS_NAME, ROOT, MANAGER, 'Checkpoint', 'sa{sv}', target, {})
            kept: dict[str, Any] = {}
            heard = set()
            while kept.get('State') != state:
                signal = await anext(signals)
                if signal.member == 'InterfacesAdded' and signal.args[0] == job:
                    kept.update(signal.args[1][JOB])
                elif signal.path == job:
                    heard.add(signal.member)
                    kept.update(signal.args[1])
            assert heard == {'PropertiesChanged'}
            assert kept == await starter.properties(BUS_NAME, job, JOB)
            assert kept['Result'] or kept['Error']


async def test_images_of_others_come_and_go(api: Api, daemon: Daemon) -> None:
    image = await asyncio.to_thread(write_image, daemon.spool)
    async with asyncio.timeout(20):
        async for signal in api.signals:
            if signal.member == 'ImageAdded':
                break
    assert signal.args == (image, image_path(image))
    shown = await api.client.properties(BUS_NAME, image_path(image), IMAGE)
    assert (shown['Id'], shown['Owner'], shown['Statistics']['frozen_time']) == (image, 1000, 9)
    await api('RemoveImage', 's', image)
    async with asyncio.timeout(20):
        async for signal in api.signals:
            if signal.member == 'ImageRemoved':
                break
    assert await api('ListImages') == []
    with pytest.raises(NoSuchImage):
        await api('VerifyImage', 's', image)
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_export_writes_a_tar_stream(api: Api, sleeper: str, tmp_path: Path) -> None:
    image = (await api.ended(await api('Checkpoint', 'sa{sv}', sleeper, {})))['Image']
    with (tmp_path / 'cores.tar').open('wb') as sink:
        for format, error in (('core', None), ('coer', InvalidArgument)):
            with contextlib.nullcontext() if error is None else pytest.raises(error, match='unknown format'):
                await api('Export', 'hsa{sv}', sink.fileno(), format, {}, path=image_path(image), interface=IMAGE)
    with tarfile.open(tmp_path / 'cores.tar') as tar:
        [core] = tar.getmembers()
    assert core.name.startswith('core')


async def test_everything_at_once(api: Api, sleeper: str) -> None:
    """GetManagedObjects has every object with its properties."""
    job = await api('Checkpoint', 'sa{sv}', sleeper, {})
    image = (await api.ended(job))['Image']
    objects = await api('GetManagedObjects', interface='org.freedesktop.DBus.ObjectManager')
    assert objects[job][JOB]['State'] == 'done'
    assert objects[image_path(image)][IMAGE]['Command'] == 'sleep'


def test_busctl_by_hand(daemon: Daemon, sleeper: str) -> None:
    assert daemon.busctl('introspect', 'org.ckptd1', '/org/ckptd1').returncode == 0
    [path] = daemon.call('Checkpoint', 'sa{sv}', sleeper, '2', 'timeout', 'u', '5000000',
                         'detach', 'b', 'true')
    assert path == '/org/ckptd1/job/1'
    refused = daemon.busctl('call', 'org.ckptd1', '/org/ckptd1', MANAGER, 'Scan', 'sa{sv}', sleeper, '1', 'x', 's', 'y')
    assert 'unknown option "x"' in refused.stderr
    assert daemon.busctl('get-property', 'org.ckptd1', path, JOB, 'Operation').stdout == 's "checkpoint"\n'

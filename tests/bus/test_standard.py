# SPDX-License-Identifier: LGPL-2.1-or-later
"""The standard interfaces, and busctl as another view of them."""

import asyncio
import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import cast

import pytest

from ckptd.bus.authorizer import Authorizer
from ckptd.bus.connection import PROPERTIES, Match
from ckptd.bus.export import Viewer
from ckptd.bus.introspect import introspection_xml
from ckptd.bus.job import JobObject
from ckptd.bus.message import DBusError
from ckptd.bus.standard import read_properties
from ckptd.errors import Finding, Refused
from ckptd.jobs.queue import Queue
from ckptd.jobs.state import JobRecord
from ckptd.protocol.requests import Caller, ScanRequest
from ckptd.target import ProcessTarget
from tests.bus.conftest import Service
from tests.bus.sample import INTERFACE, ITEM, NAME, ROOT, Item, Sample

INTROSPECTABLE = 'org.freedesktop.DBus.Introspectable'
MANAGER = 'org.freedesktop.DBus.ObjectManager'
PEER = 'org.freedesktop.DBus.Peer'


async def busctl(service: Service, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        'busctl', f'--address={service.address}', *arguments, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE)
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def xml_of(service: Service, path: str) -> ET.Element:
    async with service.client() as client:
        return ET.fromstring(await client.call(NAME, path, INTROSPECTABLE, 'Introspect'))


async def test_get_all_leaves_out_what_cannot_be_read(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    async with service.client() as client:
        assert await client.properties(NAME, ROOT, INTERFACE) == {'Version': '1', 'Calls': 0, 'Row': {'pid': 1}}
        with pytest.raises(DBusError, match='internal error'):
            await client.connection.call(NAME, ROOT, PROPERTIES, 'Get', 'ss', [INTERFACE, 'Broken'])
    assert 'Broken' in caplog.text


@pytest.mark.parametrize(('arguments', 'error'), [
    ((INTERFACE, 'Nothing'), 'UnknownProperty'), (('a.b', 'Version'), 'UnknownInterface')])
async def test_get_of_nothing(service: Service, arguments: tuple[str, str], error: str) -> None:
    async with service.client() as client:
        assert await client.property_(NAME, ROOT, '', 'Version') == '1'
        with pytest.raises(DBusError, match=error):
            await client.connection.call(NAME, ROOT, PROPERTIES, 'Get', 'ss', arguments)


async def test_properties_are_read_only(service: Service) -> None:
    async with service.client() as client:
        with pytest.raises(DBusError, match='PropertyReadOnly'):
            await client.connection.call(NAME, ROOT, PROPERTIES, 'Set', 'ssv', [INTERFACE, 'Version', '2'])


async def test_peer(service: Service) -> None:
    async with service.client() as client:
        assert await client.call(NAME, ROOT, PEER, 'Ping') is None
        assert await client.call(NAME, '/', PEER, 'Ping') is None


async def test_managed_objects_are_at_the_root_path_only(service: Service) -> None:
    service.router.export(f'{ROOT}/item/a', Item())
    service.router.export(f'{ROOT}x/b', Item())         # beside the root, not below it
    async with service.client() as client:
        assert await client.call(NAME, ROOT, MANAGER, 'GetManagedObjects') == {
            f'{ROOT}/item/a': {ITEM: {'Name': 'a'}}}
        with pytest.raises(DBusError, match='UnknownInterface'):
            await client.connection.call(NAME, f'{ROOT}/item/a', MANAGER, 'GetManagedObjects')


async def test_one_failing_getter_leaves_the_other_objects(service: Service) -> None:
    service.router.export(f'{ROOT}/bad', Sample())
    service.router.export(f'{ROOT}/good', Item())
    async with service.client() as client:
        objects = await client.call(NAME, ROOT, MANAGER, 'GetManagedObjects')
    assert objects[f'{ROOT}/good'] == {ITEM: {'Name': 'good'}}
    assert 'Broken' not in objects[f'{ROOT}/bad'][INTERFACE]


async def test_introspection_lists_children_only(service: Service) -> None:
    for name in ('item/a', 'item/ab', 'itemx', 'item'):
        service.router.export(f'{ROOT}/{name}', Item())
    for path, children in {'/': ['org'], '/org': ['ckptd1'], ROOT: ['item', 'itemx'], f'{ROOT}/item': ['a', 'ab'],
                           f'{ROOT}/item/a': []}.items():
        assert [node.get('name') for node in (await xml_of(service, path)).findall('node')] == children
    async with service.client() as client:
        with pytest.raises(DBusError, match='UnknownObject'):
            await client.connection.call(NAME, f'{ROOT}/it', INTROSPECTABLE, 'Introspect')


async def test_introspection_has_names_directions_and_annotations(service: Service) -> None:
    root = await xml_of(service, ROOT)
    echo = root.find(f'interface[@name="{INTERFACE}"]/method[@name="Echo"]')
    assert echo is not None
    assert [dict(arg.attrib) for arg in echo] == [
        {'type': 'a{sv}', 'name': 'options', 'direction': 'in'},
        {'type': 'a{sv}', 'name': 'result', 'direction': 'out'}]
    notes = {(node.get('name'), note.get('name')): note.get('value')
             for node in root.iter() for note in node.findall('annotation')}
    assert notes == {('Inode', 'org.gtk.GDBus.DocString'): 'What is behind an fd, which is then left to the router.',
                     ('OldStyleName', 'org.freedesktop.DBus.Deprecated'): 'true',
                     ('Version', 'org.freedesktop.DBus.Property.EmitsChangedSignal'): 'const',
                     ('Row', 'org.freedesktop.DBus.Property.EmitsChangedSignal'): 'invalidates'}
    assert {node.get('name') for node in root.findall('interface')} == {
        INTERFACE, MANAGER, PEER, PROPERTIES, INTROSPECTABLE}


def test_introspection_of_a_class_needs_no_bus() -> None:
    assert 'interface name="org.ckptd1.Sample"' in introspection_xml([Sample.table])


async def test_changes_are_gathered_throttled_and_the_last_is_sent(service: Service) -> None:
    got: list[tuple[dict[str, object], list[str]]] = []
    last = asyncio.Event()

    def note(message: object) -> None:
        _, changed, gone = message.body()       # type: ignore[attr-defined]
        got.append((changed, gone))
        if changed.get('Calls') == 50:
            last.set()

    async with service.client() as client:
        await client.connection.subscribe(Match(interface=PROPERTIES, path=ROOT), note)
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number in range(1, 51):
            service.sample.calls = number
            service.sample.changed('Calls', 'Row', 'Version')
            handle = loop.create_future()
            loop.call_at(start + number * 0.008, handle.set_result, None)
            await handle
        await last.wait()
        took = loop.time() - start
    # at most 10 a second, and the first and the last; when each arrives is the affair of the bus and of a busy machine
    assert 3 <= len(got) <= took * 10 + 2
    assert all(gone == ['Row'] and 'Version' not in changed for changed, gone in got)


async def test_what_changed_is_told_before_the_object_goes(service: Service) -> None:
    item = Item()
    service.router.export(f'{ROOT}/a', item)
    async with service.client() as client, client.signals(NAME) as signals:
        item.changed('Name')
        service.router.unexport(f'{ROOT}/a')
        assert [(await anext(signals)).member for _ in range(2)] == ['PropertiesChanged', 'InterfacesRemoved']
    item.changed('Name')        # nobody hears it, and nothing breaks


async def test_two_thousand_objects_cost_little(service: Service) -> None:
    for number in range(2000):
        service.router.export(f'{ROOT}/item/n{number}', Item())
    start = time.thread_time()
    for number in range(1000):
        service.sample.Happened(number, 'x')
    each = (time.thread_time() - start) / 1000
    async with service.client() as client:
        assert len(await client.call(NAME, ROOT, MANAGER, 'GetManagedObjects')) == 2000
    assert each < 0.001


@pytest.mark.needs('busctl')
async def test_busctl_introspect(service: Service) -> None:
    rows = {tuple(line.split()[:4]) for line in (await busctl(service, 'introspect', NAME, ROOT)).splitlines()}
    assert {('.Echo', 'method', 'a{sv}', 'a{sv}'), ('.Happened', 'signal', 'us', '-'),
            ('.Version', 'property', 's', '"1"'), ('.Calls', 'property', 'u', '0')} <= rows
    assert ROOT in await busctl(service, 'tree', '--list', NAME)


@pytest.mark.needs('busctl')
async def test_busctl_call_and_get_property(service: Service) -> None:
    out = await busctl(service, '--json=short', 'call', NAME, ROOT, INTERFACE, 'Echo', 'a{sv}', '2', 'pid', 'u', '7',
                       'name', 's', 'x')
    assert json.loads(out)['data'] == [{'pid': {'type': 'u', 'data': 7}, 'name': {'type': 's', 'data': 'x'}}]
    assert await busctl(service, 'get-property', NAME, ROOT, INTERFACE, 'Version') == 's "1"\n'


@pytest.mark.needs('busctl')
async def test_busctl_monitor(service: Service, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        'busctl', f'--address={service.address}', '--json=short', 'monitor', NAME, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(10):
        assert b'Monitoring' in await process.stderr.readline()
        service.sample.Happened(7, 'seen')
        while (seen := json.loads(await process.stdout.readline()))['member'] != 'Happened':
            pass
    process.terminate()
    await process.communicate()
    assert seen['payload']['data'] == [7, 'seen']


def test_the_rows_of_an_outcome_are_made_once() -> None:
    """There may be hundreds, and anybody who may see the job can ask for them as often as he likes."""
    request = ScanRequest(caller=Caller(0, 0), spool='/nowhere', runtime='/nowhere', target=ProcessTarget(1))
    job = JobRecord(1, request, 0)
    shown = JobObject(job, cast('Queue', None), cast('Authorizer', None))
    assert (shown.Error(), shown.Result()) == ({}, {})
    job.fail(Refused.because([Finding(42, 'sleep', 'ptrace', 'EPERM', 'no access', 'be root')] * 2))
    for read in (shown.Error, shown.Result):
        assert read() is read()
    rows = read_properties(shown, Viewer(0))['Error'].value['refusals']
    assert (rows.signature, len(rows.value), rows.value[0]['pid'].signature) == ('aa{sv}', 2, 'u')

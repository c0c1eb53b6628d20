# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls to exported objects: what a caller gets, whatever the handler does."""

import asyncio
import contextlib
import logging
import os
import socket
import threading

import pytest

from ckptd.bus import wire
from ckptd.bus.call import Call
from ckptd.bus.client import Client
from ckptd.bus.connection import Connection, Match
from ckptd.bus.export import Audience, Exported, method
from ckptd.bus.message import DBusError
from ckptd.bus.router import LARGE, LONG
from ckptd.bus.values import to_body
from ckptd.bus.wire import make_call
from ckptd.errors import Busy, Cancelled, CkptError, NoSuchJob, PermissionDenied, Unavailable
from tests.bus.conftest import Service, serving
from tests.bus.raw import REPLY_SERIAL, RETURN, SENDER, message
from tests.bus.sample import INTERFACE, ITEM, NAME, ROOT, Item

LISTENERS = 20


async def ask(client: Client, member: str, signature: str = '', *args: object, interface: str = INTERFACE,
              path: str = ROOT) -> list[object]:
    """A call whose errors are as they came."""
    return await client.connection.call(NAME, path, interface, member, signature, args, timeout=5)


async def test_values_are_plain_on_both_sides(service: Service) -> None:
    async with service.client() as client:
        given = {'pid': 7, 'text': 'ä', 'rows': [{'pid': 1}], 'yes': True, 'empty': []}
        assert await client.call(NAME, ROOT, INTERFACE, 'Echo', 'a{sv}', given) == given
        assert await ask(client, 'OldStyleName') == [True]
        assert await ask(client, 'OldStyleName', interface='') == [True]       # a call need not name an interface


@pytest.mark.parametrize(('arguments', 'error'), [
    ({'member': 'Nothing'}, 'UnknownMethod'), ({'member': 'Echo', 'interface': 'a.b'}, 'UnknownInterface'),
    ({'member': 'Echo', 'path': '/nowhere'}, 'UnknownObject'), ({'member': 'Echo'}, 'InvalidArgs'),
    ({'member': 'Echo', 'path': '/org', }, 'UnknownInterface')])
async def test_calls_of_nothing(service: Service, arguments: dict[str, str], error: str) -> None:
    async with service.client() as client:
        with pytest.raises(DBusError) as caught:
            await ask(client, **arguments)
    assert caught.value.name == f'org.freedesktop.DBus.Error.{error}'
    assert not service.sample.calls


async def test_an_error_of_ours_keeps_all_it_says(service: Service) -> None:
    async with service.client() as client:
        with pytest.raises(DBusError) as raw:
            await ask(client, 'Refuse')
        with pytest.raises(PermissionDenied) as caught:
            await client.call(NAME, ROOT, INTERFACE, 'Refuse')
    assert raw.value.name == 'org.ckptd1.Error.PermissionDenied'
    assert raw.value.body[1]['errno'] == 'EPERM'
    error = caught.value
    assert (error.message, error.task, error.resource) == ('not yours', 42, 'ptrace')
    assert [(row.pid, row.hint) for row in error.refusals] == [(42, 'be root')]


@pytest.mark.parametrize('member', ['Crash', 'Wrong'])
async def test_other_errors_are_logged_and_not_shown(service: Service, member: str,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    async with service.client() as client:
        with pytest.raises(CkptError) as caught:
            await client.call(NAME, ROOT, INTERFACE, member)
    assert caught.value.message == 'internal error'
    assert 'secret' not in str(caught.value.details())
    assert member in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_cancelled_handler_is_answered(service: Service) -> None:
    async with service.client() as client:
        call = asyncio.create_task(client.call(NAME, ROOT, INTERFACE, 'Wait'))
        await service.sample.started.wait()
        [task] = service.tasks
        task.cancel()
        with pytest.raises(Cancelled):
            await call
        assert task.cancelled()         # and re-raised


async def test_a_call_cancelled_before_it_began_is_answered_too(service: Service) -> None:
    async with service.client() as client:
        spawn = service.router._spawn

        def spawn_dead(coro: object, *, name: str | None = None) -> 'asyncio.Task[None]':
            task = spawn(coro, name=name)       # type: ignore[arg-type]
            task.cancel()
            return task

        service.router._spawn = spawn_dead      # type: ignore[assignment]
        with pytest.raises(Cancelled):
            await client.call(NAME, ROOT, INTERFACE, 'Wait')


async def test_export_comes_before_the_name(address: str) -> None:
    """The call that waits for the name must find its object."""
    async with await Connection.open(address) as caller:
        owned = asyncio.Event()
        await caller.subscribe(Match(member='NameOwnerChanged', arg0=NAME), lambda message: owned.set())
        async with serving(address):
            await owned.wait()
            assert await caller.call(NAME, ROOT, INTERFACE, 'OldStyleName') == [True]


async def test_a_name_has_one_owner(service: Service) -> None:
    async with service.client() as client:
        with pytest.raises(Busy):
            await client.connection.request_name(NAME)


async def test_no_call_waits_for_ever(service: Service) -> None:
    async with service.client() as client:
        with pytest.raises(Unavailable):
            await client.call(NAME, ROOT, INTERFACE, 'Wait', timeout=0.05)
        assert await ask(client, 'OldStyleName') == [True]
        service.sample.started.clear()
        waiting = asyncio.create_task(client.call(NAME, ROOT, INTERFACE, 'Wait'))
        await service.sample.started.wait()
        client.connection.abort()
        for call in (waiting, client.call(NAME, ROOT, INTERFACE, 'Wait')):
            with pytest.raises(Unavailable):
                async with asyncio.timeout(5):
                    await call


async def test_a_reply_too_late_is_dropped(service: Service) -> None:
    async with service.client() as client:
        with pytest.raises(Unavailable):
            await client.call(NAME, ROOT, INTERFACE, 'Wait', timeout=0.05)
        service.sample.release.set()
        assert await ask(client, 'OldStyleName') == [True]


async def test_only_who_was_asked_can_reply() -> None:
    """A good bus lets no other reply through; here we are the bus."""
    ours, bus = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(ours)
    asking = asyncio.create_task(connection.request(make_call(':1.5', '/', 'a.b', 'C'), timeout=5))
    await asyncio.sleep(0)
    for sender in (':1.6', ':1.5'):
        bus.send(message(RETURN, 9, [(REPLY_SERIAL, 'u', 1), (SENDER, 's', sender)]))
    assert (await asking).sender == ':1.5'
    connection.abort()
    bus.close()


async def test_the_bus_answers_for_who_is_not_there(service: Service) -> None:
    async with service.client() as client:
        with pytest.raises(DBusError, match=r'org\.freedesktop\.DBus\.Error'):
            await client.connection.call(':1.77', '/', 'a.b', 'C', timeout=5)


async def test_objects_come_and_go(service: Service) -> None:
    path = f'{ROOT}/item/a'
    async with service.client() as client, client.signals(NAME) as signals:
        service.router.export(path, Item())
        added = await anext(signals)
        assert (added.path, added.member, added.args) == (ROOT, 'InterfacesAdded', (path, {ITEM: {'Name': 'a'}}))
        assert await client.properties(NAME, path, ITEM) == {'Name': 'a'}
        service.router.unexport(path)
        removed = await anext(signals)
        assert (removed.path, removed.member, removed.args) == (ROOT, 'InterfacesRemoved', (path, [ITEM]))
        with pytest.raises(DBusError, match='UnknownObject'):
            await ask(client, 'GetAll', 's', '', interface='org.freedesktop.DBus.Properties', path=path)


async def test_a_signal_is_marshalled_once_for_all(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    marshalled: list[wire.Message] = []

    def marshal(message: wire.Message) -> bytes:
        marshalled.append(message)
        return real(message)

    real = wire.marshal
    async with contextlib.AsyncExitStack() as stack:
        heard: asyncio.Queue[tuple[str, list[object]]] = asyncio.Queue()
        for _ in range(LISTENERS):
            listener = await stack.enter_async_context(await Connection.open(service.address))
            await listener.subscribe(Match(member='Happened'), lambda message: heard.put_nowait(
                (message.destination, message.body())))
            await service.router.peers.uid(listener.unique_name)
        monkeypatch.setattr(wire, 'marshal', marshal)
        service.sample.Happened.to(Audience(os.getuid()), 7, 'text')
        assert len(marshalled) == 1
        answers = [await heard.get() for _ in range(LISTENERS)]
    assert len({destination for destination, _ in answers}) == LISTENERS
    assert [body for _, body in answers] == [[7, 'text']] * LISTENERS


async def test_a_job_that_is_gone(service: Service) -> None:
    async with service.client() as client:
        with pytest.raises(NoSuchJob):
            await client.call(NAME, '/org/ckptd1/job/7', 'org.ckptd1.Job', 'Cancel', 'a{sv}', {})


async def test_a_big_reply(service: Service) -> None:
    class Big(Exported):
        interface = 'org.ckptd1.Big'

        @method('', 'aa{sv}')
        async def Rows(self, call: Call) -> list[dict[str, object]]:
            return [{'pid': number, 'comm': 'x' * 50} for number in range(20_000)]

    service.router.export(f'{ROOT}/big', Big())
    async with service.client() as client:
        rows = await client.call(NAME, f'{ROOT}/big', 'org.ckptd1.Big', 'Rows')
    assert [row['pid'] for row in rows] == list(range(20_000))


@pytest.mark.parametrize(('count', 'elsewhere'), [(10, False), (LARGE, True)])
async def test_many_values_are_marshalled_by_another_thread(service: Service, monkeypatch: pytest.MonkeyPatch,
                                                            count: int, elsewhere: bool) -> None:
    """However deep they are in the answer."""
    threads: list[threading.Thread] = []

    def marshal(message: wire.Message) -> bytes:
        if message.signature == 'a{sv}':
            threads.append(threading.current_thread())
        return real(message)

    real = wire.marshal
    async with service.client() as client:
        monkeypatch.setattr(wire, 'marshal', marshal)
        [answer] = await ask(client, 'Rows', 'u', count)
    assert len(answer['rows']) == count
    assert [thread is not threading.main_thread() for thread in threads] == [elsewhere]


async def test_long_answers_have_their_turn(service: Service) -> None:
    """One of a user is worked on, of root's as many as there are places; other calls do not wait for that."""
    most = 1 if os.getuid() else LONG
    async with service.client() as client, service.client() as other:
        calls = [asyncio.create_task(ask(one, 'WaitLong')) for one in (client, other) for _ in range(10)]
        await service.sample.started.wait()
        for one in (client, other):     # which has sent its calls before
            assert await ask(one, 'OldStyleName') == [True]
        assert service.sample.running == most
        service.sample.release.set()
        assert await asyncio.gather(*calls) == [[]] * 20
    assert service.sample.most == most


def test_a_handler_must_fit_its_signature() -> None:
    with pytest.raises(TypeError, match='must be async and take'):
        class Bad(Exported):
            interface = 'a.b'

            @method('ss')
            async def Do(self, call: Call, one: str) -> None: ...


def test_a_signal_of_nobody_is_nothing() -> None:
    from tests.bus.sample import Sample
    Sample().Happened(1, 'x')
    assert to_body('us', (1, 'x')) == [1, 'x']

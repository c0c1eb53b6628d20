# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client: signals of one owner in order, and what happens when it goes."""

import asyncio
import contextlib
import os

import pytest

from ckptd.bus.client import Signals, as_ckpt_error, connect
from ckptd.bus.export import Audience
from ckptd.bus.message import DBusError
from ckptd.bus.systemd import Systemd
from ckptd.bus.wire import make_signal
from ckptd.errors import CkptError, InvalidArgument, NoSuchTarget, PermissionDenied, Unavailable
from tests.bus.conftest import Service, serving
from tests.bus.sample import INTERFACE, NAME, ROOT


async def test_signals_of_others_are_not_heard(service: Service) -> None:
    async with service.client() as client, service.client() as liar, client.signals(NAME, ROOT) as signals:
        fake = make_signal(ROOT, INTERFACE, 'Happened', 'us', [1, 'a lie'])
        fake.destination = client.connection.unique_name
        liar.connection.send(fake)
        await liar.call(NAME, ROOT, INTERFACE, 'OldStyleName')
        service.sample.Happened(2, 'true')
        assert (await anext(signals)).args == (2, 'true')


async def test_signals_can_be_chosen(service: Service) -> None:
    async with service.client() as client, client.signals(NAME, ROOT, INTERFACE, 'Happened') as signals:
        service.sample.changed('Calls')
        service.router.emit('/elsewhere', INTERFACE, 'Happened', 'us', (1, 'x'))
        service.sample.Happened(2, 'y')
        signal = await anext(signals)
        assert (signal.path, signal.interface, signal.member, signal.args) == (ROOT, INTERFACE, 'Happened', (2, 'y'))


async def test_a_service_that_dies_ends_the_signals(address: str) -> None:
    async with await connect(address) as client:
        async with serving(address):
            signals = client.signals(NAME)
            queue = await signals.__aenter__()
        with pytest.raises(Unavailable):
            async with asyncio.timeout(5):
                await anext(queue)
        await signals.__aexit__(None, None, None)
        assert not client.connection._subscriptions


async def test_who_follows_hears_the_next_owner(address: str) -> None:
    async with await connect(address) as client, contextlib.AsyncExitStack() as stack, asyncio.timeout(20):
        signals = Signals(follow=True)
        async with serving(address):
            await stack.enter_async_context(client.listening(signals, NAME, ROOT))
        async with serving(address) as service:
            await client.call(NAME, ROOT, INTERFACE, 'OldStyleName')
            service.router.emit(ROOT, INTERFACE, 'Happened', 'us', (2, 'y'), audience=Audience(os.getuid()))
            assert (await anext(signals)).args == (2, 'y')
        await stack.aclose()
        assert not client.connection._subscriptions


async def test_a_lost_bus_ends_the_signals(service: Service) -> None:
    async with service.client() as client, client.signals(NAME) as signals:
        client.connection.abort()
        with pytest.raises(Unavailable):
            await anext(signals)


async def test_a_service_that_is_not_there(service: Service) -> None:
    async with service.client() as client:
        for call in (client.call('org.nobody', '/', 'a.b', 'C'), client.owner('org.nobody')):
            with pytest.raises(Unavailable):
                await call
        with pytest.raises(Unavailable):
            async with client.signals('org.nobody'):
                pass
        assert not client.connection._subscriptions
        assert not await Systemd(client).is_there()
        with pytest.raises(Unavailable) as caught:
            await Systemd(client).freeze('a.service', 1)
        assert caught.value.resource == 'unit a.service'


@pytest.mark.parametrize(('name', 'kind'), [
    ('org.freedesktop.DBus.Error.AccessDenied', PermissionDenied), ('org.freedesktop.DBus.Error.NoReply', Unavailable),
    ('org.freedesktop.systemd1.NoSuchUnit', NoSuchTarget), ('org.ckptd1.Error.InvalidArgument', InvalidArgument),
    ('org.ckptd1.Error.OfTomorrow', CkptError), ('com.example.Odd', CkptError)])
def test_errors_of_others(name: str, kind: type[CkptError]) -> None:
    assert type(as_ckpt_error(DBusError(name, 'text', ['text', 'no details']))) is kind

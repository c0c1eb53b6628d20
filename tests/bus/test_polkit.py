# SPDX-License-Identifier: LGPL-2.1-or-later
"""What counts as an answer of polkit's, and what as none, and how many questions there are. tests/polkit has the real
one."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ckptd.bus import polkit as module
from ckptd.bus import wire
from ckptd.bus.connection import Connection
from ckptd.bus.polkit import ALLOW_INTERACTION, AUTHORITY, NAME, OF_PERSONS, PATH, QUICK, Polkit, PolkitAnswer
from ckptd.bus.wire import Received
from ckptd.errors import LimitsExceeded
from tests.bus.conftest import Service
from tests.lib.bus import PrivateBus

OWN, OTHER = 'org.ckptd1.freeze-own', 'org.ckptd1.freeze'
FLOOD = 200     # more than the replies that a connection may wait for


class Authority:
    """Allows what is one's own. Of everything else a person is to be asked, who says nothing before `answer`.

    asked: each question to a person. deaf: senders about whom it says nothing at all.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.asked: asyncio.Queue[Received] = asyncio.Queue()
        self.deaf: set[str] = set()
        connection.on_call = self._called

    def answer(self, message: Received, *body: Any) -> None:
        self.connection.send(wire.make_return(message, '(bba{ss})', [list(body)]))

    def _called(self, message: Received) -> None:
        message.fds.close()
        if message.member != 'CheckAuthorization':
            return
        (_, subject), action, _, flags, _ = message.body()
        if subject['name'] in self.deaf:
            return
        if flags == ALLOW_INTERACTION and action == OTHER:
            self.asked.put_nowait(message)
        else:
            self.answer(message, action == OWN, action != OWN, {})


@contextlib.asynccontextmanager
async def asking(address: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Authority, Polkit]]:
    """An authority on this bus, and who asks it."""
    monkeypatch.setattr(module, '_believed', lambda: {os.getuid()})
    async with await Connection.open(address) as theirs, await Connection.open(address) as ours:
        await theirs.request_name(NAME)
        yield Authority(theirs), Polkit(ours)


@contextlib.asynccontextmanager
async def flood(polkit: Polkit, sender: str, uid: int, action: str, *,
                interactive: bool = False) -> AsyncIterator[None]:
    """Many questions of one user, until the context ends."""
    tasks = [asyncio.create_task(polkit.ask(sender, uid, action, {}, interactive=interactive)) for _ in range(FLOOD)]
    try:
        await asyncio.sleep(0)      # each is at its first wait
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_bus_without_polkit(service: Service) -> None:
    async with await Connection.open(service.address) as connection:
        assert await Polkit(connection).ask(':1.1', 1, OWN, {}) == PolkitAnswer.ABSENT


async def test_polkit_that_leaves_while_it_is_asked_is_no_polkit_that_is_not_there(
        service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it restarts, nobody has what only its absence allows."""
    async with await Connection.open(service.address) as connection:
        async with await Connection.open(service.address) as gone:
            name = gone.unique_name
        polkit = Polkit(connection)

        async def found(self: Polkit) -> bool:
            self._trusted = name
            return True

        monkeypatch.setattr(Polkit, '_is_there', found)
        assert await polkit.ask(':1.1', 1, OWN, {}) == PolkitAnswer.SILENT


async def test_polkit_that_leaves_before_it_is_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there, or was started, and the bus knows no owner of its name any more: it is not absent."""
    async with asking(address, monkeypatch) as (authority, polkit):
        driver = Connection.driver

        async def leaving(self: Connection, member: str, signature: str = '', *args: Any) -> list[Any]:
            if member == 'GetNameOwner':
                await authority.connection.release_name(NAME)
            return await driver(self, member, signature, *args)

        monkeypatch.setattr(Connection, 'driver', leaving)
        assert await polkit.ask(':1.1', 1, OWN, {}) == PolkitAnswer.SILENT


async def test_persons_who_do_not_answer_are_in_the_way_of_their_user_alone(
        address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with asking(address, monkeypatch) as (authority, polkit), flood(polkit, ':1.1', 1, OTHER, interactive=True):
        first = [await authority.asked.get() for _ in range(OF_PERSONS[1])]
        for uid in (1, 2):      # what nobody needs to be asked about is answered
            assert await polkit.ask(f':1.{uid}', uid, OWN, {}, interactive=True) == PolkitAnswer.YES
        other = asyncio.create_task(polkit.ask(':1.2', 2, OTHER, {}, interactive=True))
        authority.answer(await authority.asked.get(), True, False, {})
        assert await other == PolkitAnswer.YES
        assert authority.asked.empty()
        authority.answer(first[0], False, False, {'polkit.dismissed': 'true'})
        (_, subject), *_ = (await authority.asked.get()).body()
        assert subject == {'name': ':1.1'}


async def test_in_all_so_many_persons_are_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_all, each = OF_PERSONS
    async with asking(address, monkeypatch) as (authority, polkit), contextlib.AsyncExitStack() as stack:
        for uid in range(1, in_all // each + 2):
            await stack.enter_async_context(flood(polkit, f':1.{uid}', uid, OTHER, interactive=True))
        for _ in range(in_all):
            await authority.asked.get()
        assert await polkit.ask(':1.99', 99, OWN, {}, interactive=True) == PolkitAnswer.YES
        assert authority.asked.empty()


async def test_polkit_that_does_not_answer_about_one_user(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """He waits for it, and is told so; when nobody waits any more, he is served."""
    async with asking(address, monkeypatch) as (authority, polkit):
        authority.deaf.add(':1.1')
        async with flood(polkit, ':1.1', 1, OWN):
            with pytest.raises(LimitsExceeded, match='too many questions to polkit') as caught:
                await polkit.ask(':1.1', 1, OWN, {}, patience=0.1)
            assert caught.value.hint
            for uid in range(2, QUICK[0] // QUICK[1] + 1):
                assert await polkit.ask(':1.2', uid, OWN, {}) == PolkitAnswer.YES
        authority.deaf.clear()
        assert await polkit.ask(':1.1', 1, OWN, {}) == PolkitAnswer.YES


@pytest.mark.needs('dbus')
async def test_a_bus_that_carries_no_more_questions(private_bus: PrivateBus, monkeypatch: pytest.MonkeyPatch) -> None:
    """That says nothing of who may do what. dbus-daemon: a connection may wait for 128 replies."""
    async with asking(private_bus.address, monkeypatch) as (_, polkit):
        ours = polkit._connection
        waiting = [asyncio.create_task(ours.call(NAME, PATH, AUTHORITY, 'Wait'))
                   for _ in range(FLOOD)]
        try:
            with pytest.raises(LimitsExceeded) as caught:
                await polkit.ask(':1.1', 1, OWN, {})
            assert caught.value.resource == 'polkit'
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What goes over the wire of calls that a client makes with file descriptors, seen from the other end."""

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ckptd.bus import wire
from ckptd.bus.connection import Connection
from ckptd.bus.message import ALLOW_INTERACTIVE
from ckptd.bus.names import BUS_NAME, IMAGE, MANAGER, ROOT, image_path
from ckptd.bus.wire import Received
from ckptd.client import Ckptd, Inhibitor, InhibitorInfo, PrepareForCheckpoint, Restored, connect
from ckptd.errors import CkptError, PermissionDenied

# what each method answers: signature, body, whether an fd goes along
ANSWERS: dict[str, tuple[str, list[Any], bool]] = {
    'ListJobs': ('a(uosss)', [[]], False), 'Inhibit': ('h', [0], True), 'Open': ('h', [0], True),
    'Import': ('o', [image_path('a_b')], False), 'ListInhibitors': ('a(sssuu)', [[['me', 'why', 'self', 1, 2]]], False),
    'Ping': ('', [], False),
    'GetImage': ('o', [image_path('a_b')], False), 'Export': ('', [], False), 'Freeze': ('u', [1], False),
}


class Other:
    """An owner of ckptd's name that writes down who calls what, and answers from the table."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.calls, self.fds = connection, dict[str, list[Any]](), dict[str, tuple[int, int]]()
        self.flags = 0
        self.reader, self.writer = os.pipe()
        connection.on_call = self._answer

    def _answer(self, call: Received) -> None:
        self.calls[call.member] = [call.path, call.interface, *call.body()]
        self.flags = call.flags
        for value in call.body():
            if isinstance(value, wire.UnixFd):
                self.fds[call.member] = os.fstat(value).st_dev, os.fstat(value).st_ino
        call.fds.close()
        if call.member == 'GetAll':
            message = wire.make_error(call, 'org.freedesktop.DBus.Error.InteractiveAuthorizationRequired', 's', ['ask'])
            self.connection.send(message)
            return
        signature, body, with_fd = ANSWERS[call.member]
        self.connection.send(wire.make_return(call, signature, body), [self.writer] if with_fd else ())

    def say(self, member: str, signature: str, *values: Any) -> None:
        self.connection.send(wire.make_signal(ROOT, MANAGER, member, signature, list(values)))

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
async def other(address: str) -> AsyncIterator[Other]:
    async with await Connection.open(address) as connection:
        made = Other(connection)
        await connection.request_name(BUS_NAME)
        yield made
        made.close()


@pytest.fixture
async def ckptd(other: Other, address: str) -> AsyncIterator[Ckptd]:
    async with connect(address) as made:
        yield made


async def test_an_inhibitor_is_an_fd(ckptd: Ckptd, other: Other) -> None:
    with await ckptd.inhibit('me', 'why', 'pid:7') as inhibitor:
        assert isinstance(inhibitor, Inhibitor)
        assert other.calls['Inhibit'] == [ROOT, MANAGER, 'me', 'why', {'target': 'pid:7'}]
        assert os.fstat(inhibitor.fileno()).st_ino == os.fstat(other.writer).st_ino
    assert inhibitor.fileno() == -1
    inhibitor.close()
    assert await ckptd.list_inhibitors() == [InhibitorInfo('me', 'why', 'self', 1, 2)]


async def test_images_go_in_and_out(ckptd: Ckptd, other: Other) -> None:
    there = os.fstat(other.reader).st_dev, os.fstat(other.reader).st_ino
    image = await ckptd.import_image(other.reader)
    assert (image.id, image.path) == ('a_b', image_path('a_b'))
    assert other.fds['Import'] == there
    await image.export(other.reader, 'tar')
    assert other.fds['Export'] == there
    assert (other.calls['Export'][1], other.calls['Export'][3:]) == (IMAGE, ['tar', {}])
    fd = await image.open()
    try:
        assert other.calls['Open'] == [image_path('a_b'), IMAGE]
        assert os.fstat(fd).st_ino == os.fstat(other.writer).st_ino
    finally:
        os.close(fd)


async def test_an_answer_without_an_fd_is_an_error(ckptd: Ckptd, other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ANSWERS, 'Inhibit', ('u', [0], False))
    with pytest.raises(CkptError, match='did not return a file descriptor'):
        await ckptd.inhibit('me', 'why')


async def test_an_fd_that_nobody_asked_for_is_closed(ckptd: Ckptd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settled check finds one that is not."""
    monkeypatch.setitem(ANSWERS, 'Freeze', ('u', [1], True))
    assert await ckptd.freeze('self') == 1


async def test_signals_of_the_next_release(ckptd: Ckptd, other: Other) -> None:
    async with ckptd.events() as events:
        assert 'Ping' in other.calls        # who never called is told nothing
        other.say('PrepareForCheckpoint', 'ob', '/a', True)
        other.say('Restored', 'su', 'a_b', 3)
        assert await anext(events) == PrepareForCheckpoint('/a', True)
        assert await anext(events) == Restored('a_b', 3)


async def test_a_person_may_be_asked(address: str, other: Other) -> None:
    async with connect(address, interactive=True) as ckptd:
        await ckptd.list_jobs()
        assert other.flags & ALLOW_INTERACTIVE
    async with connect(address) as ckptd:
        await ckptd.list_jobs()
        assert not other.flags & ALLOW_INTERACTIVE
        with pytest.raises(PermissionDenied):
            await ckptd.info()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reader and writer over a socketpair: parts, limits, fds, back-pressure."""

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from ckptd.bus import stream
from ckptd.bus.message import ProtocolError
from ckptd.bus.stream import MessageReader, MessageWriter
from ckptd.bus.wire import Received
from tests.bus.raw import (
    CALL,
    MEMBER,
    PATH,
    REPLY_SERIAL,
    RETURN,
    SIGNAL,
    SIGNATURE,
    UNIX_FDS,
    message,
    null_fd,
    open_fds,
)

Pair = tuple[socket.socket, socket.socket]
FIELDS = [(PATH, 'o', '/a'), (MEMBER, 's', 'B')]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def reader_of(sock: socket.socket, limit: int = 1000) -> MessageReader:
    return MessageReader(sock, lambda message: limit)


def test_a_message_in_single_bytes(pair: Pair) -> None:
    reader, got = reader_of(pair[0]), []
    for byte in message(CALL, 3, [*FIELDS, (SIGNATURE, 'g', 'y')], b'\5'):
        pair[1].send(bytes([byte]))
        got += list(reader.messages())
    assert [(one.path, one.serial, one.body()) for one in got] == [('/a', 3, [5])]


def test_at_most_so_many_messages_at_once(pair: Pair) -> None:
    reader = reader_of(pair[0])
    pair[1].send(b''.join(message(CALL, number, FIELDS) for number in range(1, 101)))
    assert [len(list(reader.messages())) for _ in range(5)] == [32, 32, 32, 4, 0]


def test_a_body_over_the_limit_is_not_kept(pair: Pair) -> None:
    reader = reader_of(pair[0], limit=100)
    pair[1].send(message(CALL, 1, FIELDS, bytes(101)) + message(CALL, 2, FIELDS, bytes(100)))
    first, second = reader.messages()
    assert (first.raw, first.length, second.raw) == (None, 101, bytes(100))
    with pytest.raises(ProtocolError):
        first.body()


def test_an_endless_field_array_is_skipped(pair: Pair) -> None:
    reader = reader_of(pair[0])
    pair[1].send(message(CALL, 1, [*FIELDS, (99, 's', 'x' * stream.MAX_FIELDS)], bytes(50)) + message(CALL, 2, FIELDS))
    assert [one.serial for one in reader.messages()] == [2]


def test_end_of_file(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(EOFError):
        list(reader_of(pair[0]).messages())


@pytest.mark.parametrize('together', [True, False])
def test_fds_stay_with_their_message(pair: Pair, together: bool) -> None:
    """Also when everything waits in the socket at once."""
    before, reader, got = open_fds(), reader_of(pair[0]), []
    plans = [0, 2, 0, 1, 3, 0, 253]
    with null_fd() as fd:
        for serial, count in enumerate(plans, 1):
            socket.send_fds(pair[1], [message(CALL, serial, [*FIELDS, (UNIX_FDS, 'u', count)])], [fd] * count)
            if not together:
                got += list(reader.messages())
    got += list(reader.messages())
    assert [one.fds.count for one in got] == plans
    assert all(not os.get_inheritable(one.fds[index]) for one in got for index in range(one.fds.count))
    for one in got:
        one.fds.close()
    assert open_fds() == before


def test_no_more_fds_while_too_many_wait_to_be_closed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """But those that come with a reply: who calls is known by them."""
    monkeypatch.setattr(stream, 'closing', lambda: stream.MOST_CLOSING)
    before, reader = open_fds(), reader_of(pair[0])
    with null_fd() as fd:
        for serial, kind in enumerate((CALL, RETURN, SIGNAL, RETURN), 1):
            fields = [*FIELDS, (UNIX_FDS, 'u', 2), *([(REPLY_SERIAL, 'u', 7)] if kind == RETURN else [])]
            socket.send_fds(pair[1], [message(kind, serial, fields)], [fd, fd])
    got = list(reader.messages())
    assert [(one.serial, one.fds.count) for one in got] == [(1, 0), (2, 2), (3, 0), (4, 2)]
    for one in got:
        one.fds.close()
    assert open_fds() == before


def test_fds_of_half_a_message_are_closed(pair: Pair) -> None:
    before, reader = open_fds(), reader_of(pair[0])
    with null_fd() as fd:
        socket.send_fds(pair[1], [message(CALL, 1, FIELDS, bytes(10))[:-3]], [fd])
    assert not list(reader.messages())
    assert open_fds() > before
    reader.close()
    assert open_fds() == before


def test_an_fd_index_is_checked(pair: Pair) -> None:
    received = Received(CALL, 0, 1, ord('l'), 0)
    with pytest.raises(ProtocolError):
        received.fds[0]


async def test_a_full_socket_is_no_error(pair: Pair) -> None:
    writer = MessageWriter(pair[0], pytest.fail)
    sent = [bytes([number % 256]) * 5000 for number in range(600)]
    for data in sent:
        assert writer.send(data)
    draining = asyncio.create_task(writer.drain())
    await asyncio.sleep(0)
    assert not draining.done()          # far more than HIGH_WATER waits
    pair[1].setblocking(False)
    got = bytearray()
    while len(got) < sum(map(len, sent)):
        got += await asyncio.get_running_loop().sock_recv(pair[1], 1 << 16)
    await draining
    assert got == b''.join(sent)
    writer.close()


async def test_a_reader_that_never_reads_costs_a_bounded_amount(pair: Pair) -> None:
    writer = MessageWriter(pair[0], pytest.fail)
    data = bytes(8 << 20)
    assert [writer.send(data) for _ in range(12)].count(False) == 12 - stream.MAX_QUEUE // len(data)
    writer.close()
    await writer.drain()                # who waits is let go


async def test_fds_to_send_are_duplicated_and_closed(pair: Pair) -> None:
    before = open_fds()
    writer = MessageWriter(pair[0], pytest.fail)
    with null_fd() as fd:
        writer.send(bytes(1 << 20))     # fills the socket
        writer.send(b'with', [fd])
        assert len(open_fds()) == len(before) + 2
    writer.close()
    assert open_fds() == before

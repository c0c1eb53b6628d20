# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reader and writer over a socketpair: parts, limits, fds, back-pressure."""

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from ckptd.bus import stream
from ckptd.bus.message import ProtocolError
from ckptd.bus.stream import MessageReader
from ckptd.bus.wire import Received
from ckptd.bus.writer import MAX_QUEUE, MessageWriter
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
    assert [writer.send(data) for _ in range(12)].count(False) == 12 - MAX_QUEUE // len(data)
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


# ---------------------------------------------------------------- many at once

def test_what_is_not_wanted_is_stepped_over(pair: Pair) -> None:
    """With its body and its fds, and many of them in one round."""
    before, asked = open_fds(), []

    def limit(message: Received) -> int:
        asked.append(message.serial)
        return stream.UNWANTED if message.member == 'No' else 1000

    reader = MessageReader(pair[0], limit)
    refused = message(CALL, 7, [(PATH, 'o', '/a'), (MEMBER, 's', 'No')], bytes(100))
    with null_fd() as fd:
        pair[1].send(refused * 100)
        socket.send_fds(pair[1], [refused], [fd, fd])
        socket.send_fds(pair[1], [message(CALL, 8, [*FIELDS, (UNIX_FDS, 'u', 1)])], [fd])
        pair[1].send(refused)
    [got] = reader.messages()
    assert (got.serial, got.fds.count) == (8, 1)
    assert asked == [7] * 101 + [8, 7]
    got.fds.close()
    assert open_fds() == before


def test_a_round_has_a_bound_for_those_too(pair: Pair) -> None:
    reader = MessageReader(pair[0], lambda message: stream.UNWANTED)
    one = message(CALL, 1, FIELDS)
    for _ in range(stream.REFUSED_PER_WAKE // 100 + 2):
        pair[1].send(one * 100)
    assert not list(reader.messages())
    assert reader.pending           # the socket may be empty by now, the buffer is not
    assert not list(reader.messages())
    assert not reader.pending


@pytest.mark.parametrize('size', [stream._BUFFER // 2, stream._BUFFER, 3 * stream._BUFFER + 5])
def test_bodies_of_every_size_between_small_messages(pair: Pair, size: int) -> None:
    reader, body, got = reader_of(pair[0], 1 << 20), os.urandom(size), []
    data = message(CALL, 1, FIELDS) + message(CALL, 2, FIELDS, body) + message(CALL, 3, FIELDS)
    pair[1].setblocking(False)
    while data or not got or got[-1].serial != 3:
        data = data[pair[1].send(data):] if data else data
        got += list(reader.messages())
    assert [one.serial for one in got] == [1, 2, 3]
    assert got[1].raw == body


# ---------------------------------------------------------------- turns

def taken(sock: socket.socket, size: int) -> bytes:
    data = b''
    while len(data) < size:
        data += sock.recv(size - len(data))
    return data


async def test_who_is_sent_little_does_not_wait_for_all_of_another(pair: Pair) -> None:
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    writer = MessageWriter(pair[0], pytest.fail)
    for _ in range(20):
        writer.send(b'a' * 50_000, key=1)
    writer.send(b'b' * 10, key=2)
    writer.refuse(b'c' * 10, key=3)
    drained = [asyncio.create_task(writer.drain(key)) for key in (1, 2)]
    pair[1].setblocking(False)
    got = b''
    while len(got) < 20 * 50_000 + 20:
        got += await asyncio.get_running_loop().sock_recv(pair[1], 1 << 16)
    await asyncio.gather(*drained)
    assert got.index(b'b' * 10) <= 2 * 50_000       # the one that is being sent, and the next
    assert 0 < got.index(b'c') <= 9 * 50_000        # every eighth is one of those who are refused
    writer.close()


async def test_refusals_are_sent_when_there_is_nothing_else(pair: Pair) -> None:
    writer = MessageWriter(pair[0], pytest.fail)
    for number in range(100):
        writer.refuse(bytes([number]) * 30, key=number % 3)
    assert sorted(taken(pair[1], 3000)) == sorted(b''.join(bytes([number]) * 30 for number in range(100)))
    writer.close()

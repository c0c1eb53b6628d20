# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client of the bus could do to the daemon, and what the daemon makes of it. On both kinds of bus."""

import asyncio
import os
import struct
import time

import pytest

from ckptd.bus import intake, router, stream, wire
from ckptd.bus.message import MessageType
from ckptd.errors import LimitsExceeded
from tests.bus.conftest import Service
from tests.bus.raw import (
    DESTINATION,
    MEMBER,
    NO_REPLY,
    PATH,
    SIGNAL,
    UNIX_FDS,
    Raw,
    message,
    null_fd,
    open_fds,
    same_fds,
    to_object,
)
from tests.bus.raw import INTERFACE as INTERFACE_FIELD
from tests.bus.sample import INTERFACE, NAME, ROOT

EMPTY = struct.pack('<II', 0, 0)        # an a{sv} of nothing
LIMITS = 'org.ckptd1.Error.LimitsExceeded'


def fields_of(member: str, signature: str = '') -> list[tuple[int, str, object]]:
    return to_object(NAME, ROOT, INTERFACE, member, signature)


async def answers(service: Service) -> None:
    """Another client is served as ever."""
    async with service.client() as client, asyncio.timeout(5):
        assert await client.call(NAME, ROOT, INTERFACE, 'Echo', 'a{sv}', {'text': 'x'}) == {'text': 'x'}


@pytest.mark.parametrize('number', [10, 77, 255])
async def test_unknown_header_fields_are_skipped(service: Service, number: int) -> None:
    async with await Raw.open(service.address) as raw:
        fields = [(number, 's', 'what is this'), *fields_of('Echo', 'a{sv}'), (number, 'u', 7)]
        reply = await raw.ask(fields, EMPTY)
        assert reply is None or reply.type == MessageType.RETURN
    await answers(service)
    assert service.connection.connected


async def test_an_unknown_message_type_is_ignored(service: Service) -> None:
    async with await Raw.open(service.address) as raw:
        await raw.send(bytes([ord('l'), 9, 0, 1]) + struct.pack('<III', 0, 99, 0))
        await answers(service)


async def test_a_30_mib_argument_is_refused_and_stops_nobody(service: Service) -> None:
    count = 30 << 20
    body = struct.pack('<I', count) + bytes(count)
    async with await Raw.open(service.address) as raw, service.client() as client:
        await client.call(NAME, ROOT, INTERFACE, 'Echo', 'a{sv}', {})
        sending = asyncio.create_task(raw.call(fields_of('Echo', 'ay'), body))
        waits = []
        while not sending.done():
            start = time.thread_time()
            await client.call(NAME, ROOT, INTERFACE, 'Echo', 'a{sv}', {'n': 1})
            waits.append(time.thread_time() - start)
        reply = await raw.reply_to(await sending)
        assert reply.error_name == LIMITS
        # decoding it would take seconds; half of one is the copying on a slow machine with everything in one process
        assert max(waits) < 2
    await answers(service)


@pytest.mark.parametrize('count', [1, 20, router.LARGE + 1])
async def test_an_answer_that_no_bus_takes_is_none(service: Service, count: int) -> None:
    """A system bus takes 32 MiB, and disconnects whoever sends it more."""
    async with service.client() as client:
        for member in ('Large', 'Grumble'):
            with pytest.raises(LimitsExceeded, match='the message is too long'):
                await client.call(NAME, ROOT, INTERFACE, member, 'uu', count, wire.MAX_SENT // count)
        got = await client.call(NAME, ROOT, INTERFACE, 'Large', 'uu', count, (wire.MAX_SENT >> 1) // count)
        assert sum(map(len, got)) > wire.MAX_SENT // 3
    await answers(service)


async def test_a_signal_that_no_bus_takes_is_left_out(service: Service) -> None:
    async with service.client() as client, client.signals(NAME, interface=INTERFACE) as signals:
        service.sample.Happened(1, 'x' * wire.MAX_SENT)
        service.sample.Happened(2, 'short')
        assert (await anext(signals)).args == (2, 'short')


@pytest.mark.parametrize(('size', 'decoded'), [(wire.MAX_BODY, True), (wire.MAX_BODY + 1, False)])
async def test_the_limit_of_a_body(service: Service, size: int, decoded: bool) -> None:
    head = struct.pack('<II', 0, 0)
    body = head + bytes(size - len(head))
    async with await Raw.open(service.address) as raw:
        reply = await raw.reply_to(await raw.call(fields_of('Echo', 'ay'), struct.pack('<I', size - 4) + body[4:]))
        # within the limit it is the signature that is wrong
        assert reply.error_name == ('org.freedesktop.DBus.Error.InvalidArgs' if decoded else LIMITS)


async def test_fds_nobody_asked_for_are_closed(service: Service) -> None:
    before = open_fds()
    async with await Raw.open(service.address) as raw:
        for _ in range(20):
            with null_fd() as one, null_fd() as two:
                serial = await raw.call([*fields_of('Echo', 'a{sv}'), (UNIX_FDS, 'u', 2)], EMPTY,
                                        [one, two])
                assert (await raw.reply_to(serial)).type == MessageType.RETURN
        for member, signature in (('Nothing', ''), ('Echo', 's')):      # refused before a handler runs
            with null_fd() as one:
                fields = [*fields_of(member, signature), (UNIX_FDS, 'u', 1)]
                body = struct.pack('<I', 0) + b'\0' if signature else b''
                assert (await raw.reply_to(await raw.call(fields, body, [one]))).type == MessageType.ERROR
    await same_fds(before)


async def test_fds_of_signals_and_of_late_replies_are_closed(service: Service) -> None:
    before = open_fds()
    async with await Raw.open(service.address) as raw:
        with null_fd() as file:
            fields = [(PATH, 'o', '/a'), (INTERFACE_FIELD, 's', 'a.b'), (MEMBER, 's', 'C'),
                      (DESTINATION, 's', service.connection.unique_name), (UNIX_FDS, 'u', 1)]
            await raw.send(message(SIGNAL, 50, fields), [file])
        serial = await raw.call(fields_of('Echo', 'a{sv}'), EMPTY)
        await raw.reply_to(serial)
    await same_fds(before)


async def test_a_taken_fd_is_the_handlers_and_close_on_exec(service: Service) -> None:
    async with service.client() as client:
        with null_fd() as file:
            await client.call(NAME, ROOT, INTERFACE, 'Keep', 'h', file)
            inode = os.fstat(file).st_ino
            assert await client.call(NAME, ROOT, INTERFACE, 'Inode', 'h', file) == inode
    [fd] = service.sample.taken
    assert os.fstat(fd).st_ino == inode
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(('count', 'index'), [(0, 0), (1, 1), (1, 0xFFFFFFFF)])
async def test_an_fd_index_without_an_fd_is_an_error(service: Service, count: int, index: int) -> None:
    """Index 0 with no fd attached would else be taken for fd 0."""
    before = open_fds()
    async with await Raw.open(service.address) as raw:
        with null_fd() as file:
            fields = [*fields_of('Inode', 'h'), *([(UNIX_FDS, 'u', count)] if count else [])]
            reply = await raw.ask(fields, struct.pack('<I', index), [file][:count])
        assert reply is None or reply.error_name == 'org.ckptd1.Error.InvalidArgument'
    await same_fds(before)
    await answers(service)


async def test_too_many_fds_are_refused(service: Service) -> None:
    before = open_fds()
    count = router.MAX_FDS + 1
    async with await Raw.open(service.address) as raw:
        with null_fd() as file:
            fields = [*fields_of('Inode', 'h'), (UNIX_FDS, 'u', count)]
            reply = await raw.ask(fields, struct.pack('<I', 0), [file] * count)     # the bus may have a limit too
        assert reply is None or reply.error_name == LIMITS
    await same_fds(before)


async def test_a_flood_of_calls_leaves_time_for_everybody(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader stops after MESSAGES_PER_WAKE that are let in, so the loop turns while thousands wait in the
    socket."""
    for limit in ('MAX_CALLS', 'MAX_CALLS_OF_UNKNOWN', 'MAX_CALLS_IN_ALL'):
        monkeypatch.setattr(intake, limit, 5000)
    turns, most, route = 0, 0, service.router.route
    in_turn = 0

    def counting(message: wire.Received) -> None:
        nonlocal in_turn, most
        in_turn += 1
        most = max(most, in_turn)
        route(message)

    def turn() -> None:
        nonlocal turns, in_turn, handle
        turns, in_turn = turns + 1, 0
        handle = asyncio.get_running_loop().call_soon(turn)

    service.connection.on_call = counting
    handle = asyncio.get_running_loop().call_soon(turn)
    async with await Raw.open(service.address) as raw:
        for _ in range(2000):
            await raw.call(fields_of('Echo', 'a{sv}'), EMPTY, flags=NO_REPLY)
        await raw.reply_to(await raw.call(fields_of('Nothing')))
    handle.cancel()
    assert most <= stream.MESSAGES_PER_WAKE
    assert turns >= 2000 / stream.MESSAGES_PER_WAKE
    await answers(service)


async def test_one_sender_has_a_bounded_number_of_calls_in_flight(service: Service) -> None:
    async with await Raw.open(service.address) as raw:
        await raw.reply_to(await raw.call(fields_of('Echo', 'a{sv}'), EMPTY))       # who it is has been asked then
        serials = [await raw.call(fields_of('Wait')) for _ in range(router.MAX_CALLS + 5)]
        refused = [await raw.reply_to(serial) for serial in serials[router.MAX_CALLS:]]
        assert {reply.error_name for reply in refused} == {LIMITS}
        async with asyncio.timeout(10):
            while service.sample.running < router.MAX_CALLS:        # noqa: ASYNC110 - a few begin in each turn
                await asyncio.sleep(0)
        assert service.sample.most == router.MAX_CALLS
        await answers(service)          # another sender has its own
        service.sample.release.set()
        replies = [(await raw.receive()).type for _ in range(router.MAX_CALLS)]
        assert set(replies) == {MessageType.RETURN}
        # and the places are free again
        assert (await raw.reply_to(await raw.call(fields_of('Wait')))).type == MessageType.RETURN


async def test_a_burst_of_signals_does_not_disconnect(service: Service) -> None:
    async with service.client() as client, client.signals(NAME) as signals:
        for number in range(300):
            service.sample.Happened(number, 'x' * 2000)     # without yielding once
        got = [(await anext(signals)).args[0] for _ in range(300)]
    assert got == list(range(300))
    assert service.connection.connected


async def test_a_deep_variant_costs_its_sender_only(service: Service) -> None:
    deep = b'\1v\0' * 60
    entry = struct.pack('<I', 1) + b'a\0' + deep + b'\1y\0' + b'\7'
    body = struct.pack('<II', len(entry), 0) + entry
    async with await Raw.open(service.address) as raw:
        reply = await raw.ask(fields_of('Echo', 'a{sv}'), body)
        assert reply is None or reply.type in (MessageType.RETURN, MessageType.ERROR)
    await answers(service)

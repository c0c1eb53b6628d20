# SPDX-License-Identifier: LGPL-2.1-or-later
"""The layer on dbus-next: its import, headers, signatures, authentication."""

import asyncio
import itertools
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dbus_next._private.marshaller import Marshaller

from ckptd.bus import header as header_module
from ckptd.bus import wire
from ckptd.bus.connection import Connection
from ckptd.bus.message import ProtocolError
from ckptd.bus.wire import SignatureTree
from ckptd.errors import Unavailable
from tests.bus.raw import CALL, DESTINATION, INTERFACE, MEMBER, PATH, RETURN, SIGNATURE, message

BUS = Path(wire.__file__).parent
FIELDS = [(PATH, 'o', '/a/b'), (INTERFACE, 's', 'c.d'), (MEMBER, 's', 'E'), (DESTINATION, 's', ':1.1'),
          (SIGNATURE, 'g', 's')]


def header(data: bytes) -> wire.Received:
    fields, length = header_module.lengths(data[:16])
    assert len(data) == 16 + fields + length
    return header_module.parse_header(data[:16], data[16:16 + fields])


@pytest.mark.parametrize('member', ['E', 'Ex', 'Exa', 'Exam', 'Examp', 'Exampl', 'Example', 'Examples'])
@pytest.mark.parametrize(('signature', 'body'), [('', []), ('su', ['text', 7])])
def test_a_message_that_is_addressed_later(member: str, signature: str, body: list[Any]) -> None:
    """Whatever the padding."""
    data = wire.marshal(wire.make_signal('/a/b', 'c.d', member, signature, body))
    sent = wire.address(data, 77, ':1.42')
    read = header(sent)
    read.raw = sent[len(sent) - read.length:]
    assert (read.serial, read.destination, read.member, read.signature) == (77, ':1.42', member, signature)
    assert read.body() == body
    # as the library would have made it, but for the order of its fields
    assert len(sent) == len(addressed_by_the_library(member, signature, body))


def addressed_by_the_library(member: str, signature: str, body: list[Any]) -> bytes:
    signal = wire.make_signal('/a/b', 'c.d', member, signature, body)
    signal.destination = ':1.42'
    return wire.marshal(signal)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize('sender', [':1.1', ':1.12', ':1.123', ':1.1234567'])
def test_an_error_that_is_ready_for_many(sender: str) -> None:
    """It says to each what one that is made for it says."""
    call = wire.Received(CALL, 0, 0xABCDEF, ord('l'), 0, sender=sender)
    body = ['no', {'errno': wire.Variant('s', 'EDQUOT')}]
    made = wire.make_error(call, 'a.b.Error', 'sa{sv}', body)
    made.serial = 77
    ready = wire.ready_error('a.b.Error', 'sa{sv}', body).to(call, 77)
    one, other = header(wire.marshal(made)), header(ready)
    for name in ('type', 'serial', 'length', 'error_name', 'reply_serial', 'destination', 'signature'):
        assert getattr(one, name) == getattr(other, name), name
    other.raw = ready[len(ready) - other.length:]
    assert other.body() == ['no', {'errno': 'EDQUOT'}]


def test_import_without_no_type_check_decorator() -> None:
    """As on Python 3.15."""
    gone = 'import typing\nif hasattr(typing, "no_type_check_decorator"): del typing.no_type_check_decorator\n'
    assert 'ImportError' in python(gone + 'import dbus_next').stderr
    done = python(gone + 'import ckptd.bus.wire')
    assert done.returncode == 0, done.stderr


def test_no_other_module_imports_the_library() -> None:
    others = [path.name for path in BUS.parent.rglob('*.py')
              if path != BUS / 'wire.py' and 'import dbus_next' in path.read_text().replace('from', 'import')]
    assert not others


@pytest.mark.parametrize('extra', [(10, 's', 'x'), (200, 'u', 1), (255, 'g', 'as')])
def test_unknown_fields_anywhere_are_skipped(extra: wire.Any) -> None:
    for place in range(len(FIELDS) + 1):
        found = header(message(CALL, 7, [*FIELDS[:place], extra, *FIELDS[place:]]))
        assert (found.path, found.interface, found.member, found.signature) == ('/a/b', 'c.d', 'E', 's')


def with_fields(*extra: tuple[str, wire.Any]) -> bytes:
    """The fixed part and fields of a message, with fields that no specification has, of any type."""
    unknown = [[99, wire.Variant(kind, value)] for kind, value in extra]
    fields = [[PATH, wire.Variant('o', '/a')], *unknown, [MEMBER, wire.Variant('s', 'E')]]
    raw = bytes(Marshaller('yyyyuua(yv)', [ord('l'), CALL, 0, 1, 0, 7, fields]).marshall())
    return raw + bytes(-len(raw) % 8)


@pytest.mark.parametrize('extra', [
    ('a(ss)', [['x', 'yz']] * 300), ('av', [wire.Variant('s', 'x')] * 300), ('(yv)', [1, wire.Variant('d', 1.5)]),
    ('a{sv}', {str(number): wire.Variant('as', ['x']) for number in range(300)}), ('ay', bytes(4001)),
    ('(y(nqv)a(sv)dgaai)', [1, [2, 3, wire.Variant('o', '/')], [['a', wire.Variant('g', 'a{sv}')]], 1.0, 'as', [[7]]]),
    ('at', []), ('a(t)', []), ('v', wire.Variant('v', wire.Variant('x', -1))), ('aa{s(yt)}', [{'x': [1, 2]}])])
def test_an_unknown_field_is_stepped_over_whatever_it_is(extra: tuple[str, wire.Any]) -> None:
    for fields in ([extra], [extra, ('y', 1)], [('s', 'x'), extra]):
        found = header(with_fields(*fields))
        assert (found.path, found.member) == ('/a', 'E')


def test_a_field_of_too_many_values_is_not_stepped_over() -> None:
    long = (f'({"y" * 200})', [0] * 200)
    assert header(with_fields(long)).member == 'E'
    with pytest.raises(ProtocolError, match='too many values in unknown fields'):
        header(with_fields(long, long))


@pytest.mark.parametrize(('signature', 'body'), [
    ('ag', [[''] * 3000]), ('aay', [[b''] * 3000]), ('a(gggg)', [[['', '', '', '']] * 1000]),
    ('a{sv}', [{str(number): wire.Variant('y', 1) for number in range(1000)}]),
    ('v', [wire.Variant('(' + 'y' * 20 + ')', [0] * 20)])])
def test_arguments_that_take_long_to_decode(signature: str, body: list[wire.Any]) -> None:
    """Are not decoded in a call. In an answer, which we have asked for, they are."""
    raw = bytes(Marshaller(signature, body).marshall())
    for kind, fits in ((CALL, False), (RETURN, True)):
        received = wire.Received(kind, 0, 1, ord('l'), len(raw), signature=signature, raw=raw)
        if fits:
            received.body()
        else:
            with pytest.raises(ProtocolError):
                received.body()


def test_a_field_of_the_wrong_type_counts_for_nothing() -> None:
    assert header(message(CALL, 7, [(PATH, 'u', 1), (MEMBER, 's', 'E')])).path == ''


@pytest.mark.parametrize('data', [
    b'x' * 16, b'l\1\0\2' + bytes(12), b'l\1\0\1' + struct.pack('<III', 0, 1, 8) + b'\1' * 8])
def test_nonsense_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        header_module.parse_header(data[:16], data[16:])


@pytest.mark.parametrize(('signature', 'raw'), [
    ('s', b'\xff\xff\xff\xff'), ('s', struct.pack('<I', 1) + b'\xff\0'), ('au', struct.pack('<I', 400)), ('v', b'\1'),
    ('v', b'\2yy\0'), ('h', struct.pack('<I', 0)), ('(', b'')])
def test_a_malformed_body_is_a_protocol_error(signature: str, raw: bytes) -> None:
    received = wire.Received(CALL, 0, 1, ord('l'), len(raw), signature=signature, raw=raw)
    with pytest.raises(ProtocolError):
        received.body()


def test_signatures_of_strangers_are_not_kept_for_ever() -> None:
    """The library keeps the type of every variant it ever decoded."""
    before = len(SignatureTree._cache)
    for letters in itertools.product('ynqiuxtdsog', repeat=3):
        kind = f'({"".join(letters)})'.encode()
        raw = bytes([len(kind)]) + kind + b'\0' + bytes(32)
        assert len(wire.Received(CALL, 0, 1, ord('l'), len(raw), signature='v', raw=raw).body()[0]) == 3
    assert len(SignatureTree._cache) == before
    assert wire.parse_signature.cache_info().currsize <= wire.MAX_SIGNATURES


@pytest.mark.parametrize('kind', list('nqiuxtd'))
@pytest.mark.parametrize('order', ['<', '>'])
def test_arrays_of_numbers(kind: str, order: str) -> None:
    code = {'n': 'h', 'q': 'H', 'i': 'i', 'u': 'I', 'x': 'q', 't': 'Q', 'd': 'd'}[kind]
    items = struct.pack(f'{order}3{code}', 1, 2, 3)
    raw = b'\7' + bytes(3) + struct.pack(f'{order}I', len(items)) + items + b'\7'
    endian = ord('l' if order == '<' else 'B')
    assert wire.Received(CALL, 0, 1, endian, len(raw), signature=f'ya{kind}y', raw=raw).body() == [7, [1, 2, 3], 7]


async def test_a_bus_that_hangs_up_while_authenticating(tmp_path: Path) -> None:
    """The library would spin for ever, without yielding once."""
    def hang_up(sock: socket.socket) -> None:
        peer, _ = sock.accept()
        peer.recv(100)
        peer.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / 's'))
        listener.listen()
        loop = asyncio.get_running_loop()
        loop.add_reader(listener, hang_up, listener)
        with pytest.raises(Unavailable):
            await Connection.open(f'unix:path={tmp_path}/s', timeout=5)
        loop.remove_reader(listener)


async def test_a_bus_that_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / 's'))
        listener.listen()
        with pytest.raises(Unavailable):
            await Connection.open(f'unix:path={tmp_path}/s', timeout=0.05)


@pytest.mark.parametrize('address', [
    'unix:path=/nonexistent/bus', 'unix:path=/a;unix:path=/b', 'nonsense', 'tcp:host=x', 'unix:runtime=yes', ''])
async def test_no_bus_there(address: str) -> None:
    with pytest.raises(Unavailable):
        await Connection.open(address, timeout=5)


def test_the_session_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DBUS_SESSION_BUS_ADDRESS', 'unix:path=/x')
    assert wire.resolve_address('session') == 'unix:path=/x'
    monkeypatch.delenv('DBUS_SESSION_BUS_ADDRESS')
    monkeypatch.setenv('XDG_RUNTIME_DIR', '/run/user/7')
    assert wire.resolve_address('session') == 'unix:path=/run/user/7/bus'
    monkeypatch.delenv('XDG_RUNTIME_DIR')
    with pytest.raises(OSError, match='no session bus'):
        wire.resolve_address('session')

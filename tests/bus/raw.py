# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the bus that marshals by itself, so that it can send what no library would."""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Self

from ckptd.bus import header, wire
from ckptd.bus.wire import Received
from tests.lib.settled import join_closers

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
NO_REPLY = 1
PATH, INTERFACE, MEMBER, REPLY_SERIAL, DESTINATION, SENDER, SIGNATURE, UNIX_FDS = 1, 2, 3, 5, 6, 7, 8, 9
Field = tuple[int, str, Any]


def pad(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def encode(signature: str, value: Any) -> bytes:
    """A basic value, for a place that is aligned to 4."""
    if signature == 'u':
        return struct.pack('<I', value)
    data = value.encode()
    if signature == 'g':
        return bytes([len(data)]) + data + b'\0'
    return struct.pack('<I', len(data)) + data + b'\0'


def message(kind: int, serial: int, fields: Sequence[Field], body: bytes = b'', flags: int = 0) -> bytes:
    """A whole message, little-endian. A field's value is at 4 modulo 8: number, signature and its NUL come before."""
    array = b''
    for number, signature, value in fields:
        array = pad(array, 8) + bytes([number]) + encode('g', signature) + encode(signature, value)
    header = struct.pack('<BBBBIII', ord('l'), kind, flags, 1, len(body), serial, len(array))
    return pad(header + array, 8) + body


class Raw:
    """One connection; `name` is its unique name."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._serial, self.name = sock, 0, ''

    @classmethod
    async def open(cls, address: str) -> Self:
        self = cls(await wire.open_socket(address))
        serial = await self.call([(PATH, 'o', '/org/freedesktop/DBus'), (MEMBER, 's', 'Hello'),
                                  (INTERFACE, 's', 'org.freedesktop.DBus'), (DESTINATION, 's', 'org.freedesktop.DBus')])
        self.name = (await self.reply_to(serial)).body()[0]
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._sock.close()

    async def call(self, fields: Sequence[Field], body: bytes = b'', fds: Sequence[int] = (), flags: int = 0) -> int:
        """Send a method call; its serial."""
        self._serial += 1
        await self.send(message(CALL, self._serial, fields, body, flags), fds)
        return self._serial

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        loop = asyncio.get_running_loop()
        if fds:
            data = data[socket.send_fds(self._sock, [data], fds):]
        await loop.sock_sendall(self._sock, data)

    def finish(self) -> None:
        """Send no more: the bus hangs up when it has passed on what was sent, and its answers."""
        self._sock.shutdown(socket.SHUT_WR)

    async def receive(self) -> Received:
        """The next message, whatever it is. EOFError when the bus hangs up."""
        fixed = await self._exactly(16)
        fields, length = header.lengths(fixed)
        received = header.parse_header(fixed, await self._exactly(fields))
        received.raw = await self._exactly(length)
        return received

    async def ask(self, fields: Sequence[Field], body: bytes = b'', fds: Sequence[int] = ()) -> Received | None:
        """Call and wait for the reply; None when the bus hangs up on us for it."""
        try:
            return await self.reply_to(await self.call(fields, body, fds))
        except (EOFError, ConnectionError):
            return None

    async def reply_to(self, serial: int) -> Received:
        while (received := await self.receive()).reply_serial != serial:
            pass
        return received

    async def _exactly(self, count: int) -> bytes:
        data = b''
        while len(data) < count:
            piece = await asyncio.get_running_loop().sock_recv(self._sock, count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def to_object(destination: str, path: str, interface: str, member: str, signature: str = '') -> list[Field]:
    """The header fields of an ordinary call."""
    fields: list[Field] = [(PATH, 'o', path), (INTERFACE, 's', interface), (MEMBER, 's', member),
                           (DESTINATION, 's', destination)]
    return [*fields, (SIGNATURE, 'g', signature)] if signature else fields


@contextlib.contextmanager
def null_fd() -> Iterator[int]:
    """An fd to pass."""
    fd = os.open('/dev/null', os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


async def same_fds(before: set[int]) -> None:
    """The pidfd of a caller goes with it, as soon as the bus has told."""
    async with asyncio.timeout(10):
        while open_fds() != before:     # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def open_fds() -> set[int]:
    """Numbers of the open fds of this process, once those that are being closed are."""
    join_closers()
    listed = [int(name) for name in os.listdir('/proc/self/fd')]        # noqa: PTH208 - numbers, no paths
    # the listing had an fd of its own, which is in the list
    return {fd for fd in listed if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True

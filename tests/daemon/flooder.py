# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two clients of a system bus, each a program of its own: python -m tests.daemon.flooder flood|measure ADDRESS UID

    flood       CONNECTIONS connections, each with WINDOW calls that wait for their answer; as soon as half of them are
                answered there are as many new ones, until standard input ends. Says 'flooding' when all have begun
    measure     with each line on standard input, the seconds that TIMES calls of ListImages took, and as many of a
                method of the bus itself, as a line of JSON
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 - what is imported later is not to be found by another user
import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from itertools import cycle

from ckptd.bus import header
from ckptd.bus.client import Client, connect
from ckptd.bus.connection import DRIVER, DRIVER_PATH
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from ckptd.bus.wire import socket_names
from tests.bus.raw import CALL, ERROR, RETURN, message, to_object

CONNECTIONS, WINDOW = 60, 100       # a system bus lets 128 calls of a connection wait
TIMES = 15


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack('<I', len(data)) + data + b'\0'


def with_options(value: str) -> bytes:
    """The body of (s, a{sv} without any)."""
    data = text(value)
    data += bytes(-len(data) % 4) + struct.pack('<I', 0)
    return data + bytes(-len(data) % 8)


IMAGE = '20260101_000000_x_0000'
CALLS = [message(CALL, 1, to_object(BUS_NAME, ROOT, MANAGER, member, signature), body) for member, signature, body in (
    ('ListImages', '', b''), ('Scan', 'sa{sv}', with_options('pid:1')), ('Check', 'sa{sv}', with_options('self')),
    ('VerifyImage', 's', text(IMAGE)), ('ListJobs', '', b''), ('CheckRestore', 'sa{sv}', with_options(IMAGE)))]


class Connection:
    """One of the flood. It reads whatever comes."""

    def __init__(self, path: str, uid: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.sendall(b'\0AUTH EXTERNAL %s\r\n' % str(uid).encode().hex().encode())
        line = b''
        while not line.endswith(b'\r\n'):
            line += self.sock.recv(1)
        self.sock.sendall(b'BEGIN\r\n' + message(CALL, 1, to_object(DRIVER, DRIVER_PATH, DRIVER, 'Hello')))
        self.sock.setblocking(False)
        self._calls, self._serial, self._waiting = cycle(CALLS), 1, 1
        self._in, self._out = bytearray(), bytearray()

    def call(self) -> None:
        """As many as may wait."""
        if not self._out and self._waiting < WINDOW // 2:
            for _ in range(WINDOW - self._waiting):
                start = len(self._out)
                self._out += next(self._calls)
                self._serial += 1
                self._waiting += 1
                struct.pack_into('<I', self._out, start + 8, self._serial)
        with contextlib.suppress(BlockingIOError):
            del self._out[:self.sock.send(self._out)]

    def read(self) -> None:
        """ConnectionError when the bus has hung up."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError
        self._in += data
        while len(self._in) >= header.FIXED:
            size = header.FIXED + sum(header.lengths(bytes(self._in[:header.FIXED])))
            if len(self._in) < size:
                break
            self._waiting -= self._in[1] in (RETURN, ERROR)
            del self._in[:size]


def flood(address: str, uid: int) -> None:
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    become(uid)
    [path] = socket_names(address)
    some = {one.sock.fileno(): one for one in (Connection(path, uid) for _ in range(CONNECTIONS))}
    for fd, one in some.items():
        poll.register(fd, select.POLLIN)
        one.call()
    print('flooding', flush=True)
    while True:
        for fd, _ in poll.poll():
            if fd == sys.stdin.fileno():
                return
            try:
                some[fd].read()
                some[fd].call()
            except ConnectionError:
                poll.unregister(fd)


async def timed(client: Client, destination: str, path: str, interface: str, member: str) -> list[float]:
    times = []
    for _ in range(TIMES):
        start = time.monotonic()
        await client.call(destination, path, interface, member, timeout=100)
        times.append(time.monotonic() - start)
    return times


async def measure(address: str, uid: int) -> None:
    become(uid)
    async with await connect(address) as client:
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps([await timed(client, BUS_NAME, ROOT, MANAGER, 'ListImages'),
                              await timed(client, DRIVER, DRIVER_PATH, DRIVER, 'GetId')]), flush=True)


if __name__ == '__main__':
    if sys.argv[1] == 'flood':
        flood(sys.argv[2], int(sys.argv[3]))
    else:
        asyncio.run(measure(sys.argv[2], int(sys.argv[3])))

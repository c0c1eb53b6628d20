# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write messages and their fds to the bus's socket, without blocking and with bounds.

A bus reads as much from one connection as from any other (dbus-daemon: 2 KiB in each round), so sixty clients can send
it more than one service can answer. So answers wait here, in turn between their receivers. Only few of them are in the
kernel's buffer, where they can no longer be reordered (Connection, SO_SNDBUF).
"""

import asyncio
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from ckptd.bus.turns import Key, Turns

log = logging.getLogger(__name__)

HIGH_WATER: Final = 1 << 20         # bytes queued at which drain() waits
MAX_QUEUE: Final = 64 << 20         # bytes queued at which messages are dropped
MAX_REFUSALS: Final = 1 << 16       # messages of some 400 bytes
REFUSED_SHARE: Final = 8
TOGETHER: Final = 2 << 10           # bytes of refusals that are sent at a time


class MessageWriter:
    """Queues of marshalled messages in front of the socket, served in turn between receivers. Refusals, which may be
    many, get every eighth turn."""

    def __init__(self, sock: socket.socket, on_error: Callable[[OSError], None]) -> None:
        self._sock, self._on_error = sock, on_error
        self._loop = asyncio.get_running_loop()
        self._messages: Turns[tuple[bytes, list[int]]] = Turns()
        self._refusals: Turns[bytes] = Turns()
        self._now, self._fds = memoryview(b''), list[int]()      # the rest of the message that is being sent
        self._sent = 0
        self._waits: dict[asyncio.Future[None], Callable[[], bool]] = {}
        self._closed = self._blocked = False

    @property
    def _size(self) -> int:
        return len(self._now) + self._messages.size

    def send(self, data: bytes, fds: Sequence[int] = (), key: Key = '') -> bool:
        """Queue one message and send what the socket takes now. Return False if it was dropped because too much is
        queued."""
        if self._closed or (self._size and self._size + len(data) > MAX_QUEUE):
            log.warning('a message of %d bytes is dropped: %d bytes wait for the bus', len(data), self._size)
            return False
        # duplicates, because the message may leave after its sender closes the originals
        self._messages.put(key, (data, [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0) for fd in fds]), len(data))
        self._go_on()
        return True

    def refuse(self, data: bytes, key: Key) -> None:
        """Queue a short message that may wait. Beyond MAX_REFUSALS new ones are dropped: there is a bus in between, and
        a client that sends so many calls cannot wait for each answer."""
        if self._refusals.count < MAX_REFUSALS and not self._closed:
            self._refusals.put(key, data, len(data))
            self._go_on()

    async def drain(self, key: Key | None = None) -> None:
        """Wait until less than HIGH_WATER bytes are queued, for one receiver or for all, or the connection is gone."""
        await self._until(lambda: (self._size if key is None else self._messages.size_of(key)) < HIGH_WATER)

    async def flush(self) -> None:
        """Wait until nothing is queued, or the connection is gone."""
        await self._until(lambda: not self._size and not self._refusals.count)

    async def _until(self, condition: Callable[[], bool]) -> None:
        if condition() or self._closed:
            return
        future: asyncio.Future[None] = self._loop.create_future()
        self._waits[future] = condition
        try:
            await future
        finally:
            self._waits.pop(future, None)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_writer(self._sock)
        _close_all(self._fds)
        while (message := self._messages.take()) is not None:
            _close_all(message[1])
        self._now = memoryview(b'')
        self._tell()

    def _go_on(self) -> None:
        if not self._blocked:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._now or self._take():
                self._send_now()
        except BlockingIOError:
            # never an error: any burst is faster than a bus reads
            if not self._blocked:
                self._blocked = True
                self._loop.add_writer(self._sock, self._flush)
        except OSError as error:
            self._on_error(error)
            return
        else:
            if self._blocked:
                self._blocked = False
                self._loop.remove_writer(self._sock)
        self._tell()

    def _take(self) -> bool:
        """Choose what is sent next. Return False when nothing waits."""
        self._sent += 1
        if not self._messages.count or (self._refusals.count and not self._sent % REFUSED_SHARE):
            self._now = memoryview(self._some_refusals())
            return bool(self._now)
        data, self._fds = self._messages.take() or (b'', [])
        self._now = memoryview(data)
        return True

    def _some_refusals(self) -> bytes:
        """Join some refusals, to save system calls."""
        data = b''
        while len(data) < TOGETHER and (one := self._refusals.take()) is not None:
            data += one
        return data

    def _send_now(self) -> None:
        if self._fds:
            sent = socket.send_fds(self._sock, [self._now], self._fds)
            _close_all(self._fds)
        else:
            sent = self._sock.send(self._now)
        self._now = self._now[sent:]

    def _tell(self) -> None:
        for future, condition in list(self._waits.items()):
            if (self._closed or condition()) and not future.done():
                future.set_result(None)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())

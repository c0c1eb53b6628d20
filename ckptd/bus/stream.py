# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages and their fds from and to the bus's socket, never blocking and never without a bound.

The reader asks the kernel for the rest of the current part of the current message (16 fixed bytes, field array, body),
never for more: what SCM_RIGHTS brings along with a part then belongs to that message, whatever its fields say.
"""

import array
import asyncio
import fcntl
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ckptd.bus.header import FIXED, lengths, parse_header
from ckptd.bus.message import Fds, MessageType, ProtocolError
from ckptd.bus.wire import Received
from ckptd.kernel.closing import MOST as MOST_CLOSING
from ckptd.kernel.closing import closing

log = logging.getLogger(__name__)

MAX_FIELDS: Final = 8 << 10         # bytes of a field array; ours have some 200
MESSAGES_PER_WAKE: Final = 32
BYTES_PER_WAKE: Final = 1 << 20
SCM_MAX_FD: Final = 253             # <net/scm.h>: the kernel takes no more in one message
HIGH_WATER: Final = 1 << 20         # bytes queued at which drain() waits
MAX_QUEUE: Final = 64 << 20         # bytes queued at which messages are dropped

_CONTROL = socket.CMSG_SPACE(SCM_MAX_FD * array.array('i').itemsize)


class MessageReader:
    """limit(message without body) -> bytes of body to take; a longer body is read and forgotten piece by piece."""

    def __init__(self, sock: socket.socket, limit: Callable[[Received], int]) -> None:
        self._sock, self._limit = sock, limit
        self._scratch = bytearray(64 << 10)
        self._budget = 0
        self._fds = Fds()
        self._begin()

    def _begin(self) -> None:
        self._message: Received | None = None
        self._fixed = b''
        self._skip = 0
        self._expect(bytearray(FIXED))

    def _expect(self, part: bytearray | memoryview) -> None:
        self._part, self._have = part, 0

    def messages(self) -> Iterator[Received]:
        """Whole messages that are there, up to MESSAGES_PER_WAKE; their fds are the receiver's to close.

        EOFError when the bus has closed the connection, ProtocolError for what is no message, OSError.
        """
        self._budget = BYTES_PER_WAKE
        count = 0
        while count < MESSAGES_PER_WAKE and self._fill():
            if (message := self._advance()) is not None:
                count += 1
                yield message

    def close(self) -> None:
        self._fds.close()

    def _fill(self) -> bool:
        """Whether the current part is whole now; if not, the socket or the budget of this wake-up is empty."""
        while self._have < len(self._part):
            if self._budget <= 0:
                return False
            rest = memoryview(self._part)[self._have:]
            try:
                room = _CONTROL if closing() < MOST_CLOSING or self._is_reply() else 0
                count, control, _, _ = self._sock.recvmsg_into([rest], room, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return False
            self._keep_fds(control)
            if not count:
                raise EOFError('the bus closed the connection')
            self._have += count
            self._budget -= count
        return True

    def _is_reply(self) -> bool:
        """Of what begins now. Where there is no room for fds the kernel drops them, and so it is to do while too many
        wait for somebody's file system; but not with those that we have asked for, the bus's or systemd's own."""
        begins = not self._fixed and not self._have
        return begins and self._sock.recv(2, socket.MSG_PEEK)[1:] == bytes([MessageType.RETURN])

    def _keep_fds(self, control: Sequence[tuple[int, int, bytes]]) -> None:
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array('i')
                fds.frombytes(data[:len(data) - len(data) % fds.itemsize])
                self._fds.add(fds)

    def _advance(self) -> Received | None:
        """The part is whole: what comes next? The message, when that was its last part."""
        if self._skip:
            self._skip -= len(self._part)
            return self._skip_on()
        if self._message is not None:
            self._message.raw = bytes(self._part)
            return self._finish()
        if not self._fixed:
            self._begin_fields()
            return None
        return self._begin_body()

    def _begin_fields(self) -> None:
        self._fixed = bytes(self._part)
        fields, body = lengths(self._fixed)
        if fields > MAX_FIELDS:
            # not even its sender is known then: nobody to answer
            self._skip = fields + body
            self._skip_on()
        else:
            self._expect(bytearray(fields))

    def _begin_body(self) -> Received | None:
        try:
            self._message = message = parse_header(self._fixed, bytes(self._part))
        except ProtocolError as error:
            log.warning('a message is not read: %s', error)
            self._skip = lengths(self._fixed)[1]
            return self._skip_on()
        if not message.length:
            return self._finish()
        if message.length <= self._limit(message):
            self._expect(bytearray(message.length))
            return None
        message.raw = None
        self._skip = message.length
        return self._skip_on()

    def _skip_on(self) -> Received | None:
        if not self._skip:
            return self._finish()
        self._expect(memoryview(self._scratch)[:min(self._skip, len(self._scratch))])
        return None

    def _finish(self) -> Received | None:
        message, fds = self._message, self._fds
        self._fds = Fds()
        self._begin()
        if message is None:
            fds.close()
        else:
            message.fds = fds
        return message


class MessageWriter:
    """A bounded queue of marshalled messages in front of the socket."""

    def __init__(self, sock: socket.socket, on_error: Callable[[OSError], None]) -> None:
        self._sock, self._on_error = sock, on_error
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._size = 0
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Queue one message and send what the socket takes now. False: dropped, because far too much is queued."""
        if self._closed or (self._queue and self._size + len(data) > MAX_QUEUE):
            log.warning('a message of %d bytes is dropped: %d bytes wait for the bus', len(data), self._size)
            return False
        # duplicates: the message may leave later than its sender closes the originals
        self._queue.append((memoryview(data), [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0) for fd in fds]))
        self._size += len(data)
        if len(self._queue) == 1:
            self._flush()
        self._check_room()
        return True

    async def drain(self) -> None:
        """Wait until less than HIGH_WATER bytes are queued, or the connection is gone."""
        await self._room.wait()

    async def flush(self) -> None:
        """Wait until nothing is queued, or the connection is gone."""
        while self._queue:
            self._room.clear()
            await self._room.wait()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_writer(self._sock)
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()
        self._size = 0
        self._room.set()

    def _flush(self) -> None:
        try:
            while self._queue:
                self._send_first()
        except BlockingIOError:
            # never an error: a burst is faster than any bus reads
            self._loop.add_writer(self._sock, self._flush)
            self._check_room()
            return
        except OSError as error:
            self._on_error(error)
            return
        self._loop.remove_writer(self._sock)
        self._check_room()

    def _send_first(self) -> None:
        data, fds = self._queue[0]
        if fds:
            sent = socket.send_fds(self._sock, [data], fds)
            _close_all(fds)
        else:
            sent = self._sock.send(data)
        self._size -= sent
        if sent == len(data):
            self._queue.popleft()
        else:
            self._queue[0] = (data[sent:], [])

    def _check_room(self) -> None:
        if self._size < HIGH_WATER:
            self._room.set()
        else:
            self._room.clear()


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())

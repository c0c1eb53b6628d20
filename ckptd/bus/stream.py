# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read messages and their fds from the bus's socket, without blocking and with bounds.

The reader asks the kernel for as much as there is, so that a flood of small messages costs few system calls. A bus
sends each message by itself, with its fds at the first byte, and a read ends behind the data that fds came with
(unix_stream_read_generic in net/unix/af_unix.c). So fds belong to the last message that begins in the data read with
them, whatever its fields say.
"""

import array
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ckptd.bus.header import FIXED, lengths, parse_fields, read_fixed
from ckptd.bus.message import Fds, MessageType, ProtocolError
from ckptd.bus.wire import Received
from ckptd.kernel.closing import MOST as MOST_CLOSING
from ckptd.kernel.closing import closing

log = logging.getLogger(__name__)

MAX_FIELDS: Final = 8 << 10         # bytes of a field array; ckptd's own have some 200
MESSAGES_PER_WAKE: Final = 32
REFUSED_PER_WAKE: Final = 1024      # messages that are skipped: some 5 us each
BYTES_PER_WAKE: Final = 4 << 20
SCM_MAX_FD: Final = 253             # <net/scm.h>: the kernel takes no more in one message
UNWANTED: Final = -1                # a limit: the message is not read at all

_CONTROL = socket.CMSG_SPACE(SCM_MAX_FD * array.array('i').itemsize)
_BUFFER: Final = 64 << 10


class MessageReader:
    """A reader of messages. limit(message without body) returns how many bytes of body to take, or UNWANTED for a
    message to ignore. A longer message is skipped.

        stream      ... message | message | mess      the buffer holds the bytes that were read and not taken yet
                                 ^ _at    ^ _end      as offsets in the stream; the next byte to take is _buffer[_start]

    The current message begins at `_began`. Once its head is taken, its body either goes to `_body`, which then has
    `_have` bytes, or is skipped, with `_skip` bytes to go.
    """

    def __init__(self, sock: socket.socket, limit: Callable[[Received], int]) -> None:
        self._sock, self._limit = sock, limit
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._at = self._end = 0
        self._taken = False
        self._message: Received | None = None   # None also for a message that is ignored
        self._began = self._skip = self._have = 0
        self._body = bytearray()
        self._fds: dict[int, Fds] = {}      # by the offset where their message begins
        self._budget = self._refused = 0
        self.pending = False    # the last round ended by its bounds: there may be more that no socket reports

    def messages(self) -> Iterator[Received]:
        """Yield whole messages that have arrived, up to MESSAGES_PER_WAKE. The receiver closes their fds.

        EOFError when the bus has closed the connection, ProtocolError for bytes that are not a message, OSError.
        """
        self._budget, self._refused, count = BYTES_PER_WAKE, 0, 0
        self.pending = True
        while count < MESSAGES_PER_WAKE and self._refused < REFUSED_PER_WAKE:
            if self._advance():
                if (message := self._finish()) is not None:
                    count += 1
                    yield message
            elif self._refused < REFUSED_PER_WAKE and not self._fill():
                return

    def close(self) -> None:
        for fds in self._fds.values():
            fds.close()
        self._fds.clear()

    # ------------------------------------------------------------ from the socket

    def _fill(self) -> bool:
        """Read more. Return False when the socket, or the budget of this wake-up, is empty."""
        if self._budget <= 0:
            return False
        into_body, room, ancillary = self._into_body, self._room(), _CONTROL
        try:
            if closing() >= MOST_CLOSING:
                # Without room for fds the kernel drops them. This is wanted while too many fds wait for some file
                # system, but not for replies to our own calls, which come from the bus or systemd.
                room, ancillary = room[:self._wanted()], _CONTROL if self._is_reply() else 0
            count, control, _, _ = self._sock.recvmsg_into([room], ancillary, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            self.pending = False
            return False
        self._end += count
        if into_body:
            self._at, self._have = self._end, self._have + count
        self._keep_fds(control)
        if not count:
            raise EOFError('the bus closed the connection')
        self._budget -= count
        return True

    @property
    def _into_body(self) -> bool:
        """Whether the rest of a body is read directly to its place, and nothing behind it."""
        return len(self._body) - self._have > _BUFFER // 2

    def _room(self) -> memoryview:
        if self._into_body:     # the buffer is empty
            return memoryview(self._body)[self._have:]
        used = self._end - self._at
        if self._start + used > _BUFFER // 2:
            self._buffer[:used] = self._buffer[self._start:self._start + used]
            self._start = 0
        return self._buffer[self._start + used:]

    def _wanted(self) -> int:
        """Return how many bytes the current message needs at least."""
        if self._taken:
            return self._missing
        used = self._end - self._at
        return FIXED - used if used < FIXED else FIXED + self._lengths(self._at)[0] - used

    def _is_reply(self) -> bool:
        """Whether the message that begins now is a reply."""
        begins = self._at == self._end and not self._taken
        return begins and self._sock.recv(2, socket.MSG_PEEK)[1:] == bytes([MessageType.RETURN])

    def _lengths(self, at: int) -> tuple[int, int]:
        """Return the lengths of field array and body of the message that begins at this offset of the stream."""
        start = self._start + at - self._at
        return lengths(bytes(self._buffer[start:start + FIXED]))

    def _keep_fds(self, control: Sequence[tuple[int, int, bytes]]) -> None:
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array('i')
                fds.frombytes(data[:len(data) - len(data) % fds.itemsize])
                self._fds.setdefault(self._last_begin(), Fds()).add(fds)

    def _last_begin(self) -> int:
        """Return where the last message begins of which something was read."""
        begin, at = (self._began, self._at + self._missing) if self._taken else (self._at, self._at)
        while at < self._end:
            begin = at
            if at + FIXED > self._end:
                break
            at += FIXED + sum(self._lengths(at))
        return begin

    # ------------------------------------------------------------ from the buffer

    def _advance(self) -> bool:
        """Whether the current message is complete now."""
        if not self._taken and not self._take_head():
            return False
        if self._skip:
            self._skip -= self._consume(self._skip)
        elif self._missing:
            start = self._start
            count = self._consume(self._missing)
            self._body[self._have:self._have + count] = self._buffer[start:start + count]
            self._have += count
        return not self._missing

    @property
    def _missing(self) -> int:
        """Return how many bytes of the current message, behind its head, are not read yet or not taken from the
        buffer."""
        return self._skip or len(self._body) - self._have

    def _consume(self, most: int) -> int:
        count = min(most, self._end - self._at)
        self._start, self._at = self._start + count, self._at + count
        return count

    def _take_head(self) -> bool:
        """Decide about the message that begins here. Return False if its head is incomplete. An unwanted message that
        is whole in the buffer is skipped."""
        while (taken := self._decide()) is None:
            if self._refused >= REFUSED_PER_WAKE:
                return False
        return taken

    def _decide(self) -> bool | None:
        start, used = self._start, self._end - self._at
        if used < FIXED:
            return False
        fixed = read_fixed(bytes(self._buffer[start:start + FIXED]))
        fields, body = (fixed[6] + 7) & ~7, fixed[4]
        if fields > MAX_FIELDS:
            # the head is too long to read, so not even the sender is known and no answer can be sent
            self._taken, self._began, self._skip = True, self._at, FIXED + fields + body
            return True
        if used < FIXED + fields:
            return False
        self._taken, self._began = True, self._at
        rest = bytes(self._buffer[start + FIXED:start + FIXED + fields])
        self._consume(FIXED + fields)
        try:
            message = parse_fields(fixed, rest)
        except ProtocolError as error:
            log.warning('a message is skipped: %s', error)
            self._skip = body
            return True
        limit = self._limit(message)
        if limit == UNWANTED:
            self._refused += 1
            if used >= FIXED + fields + body and not self._fds:
                self._consume(body)
                self._taken = False
                return None
        else:
            self._message = message
        if body > limit:
            message.raw, self._skip = None, body
        else:
            self._body = bytearray(body)
        return True

    def _finish(self) -> Received | None:
        message, fds = self._message, self._fds.pop(self._began, None)
        if message is not None:
            message.fds = fds or message.fds
            if message.raw is not None:
                message.raw = self._body
        elif fds is not None:
            fds.close()
        self._taken, self._message, self._body, self._have = False, None, bytearray(), 0
        return message

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The worker's end of its socket: messages out, Cancel and end-of-file in. The end of the daemon's pidfd counts as
end-of-file, too."""

import array
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import msgspec

from ckptd.errors import Cancelled, CkptError, LimitsExceeded
from ckptd.kernel.task import bytes_written
from ckptd.protocol.messages import (
    MAX_MESSAGE,
    Answer,
    Cancel,
    Failed,
    Finished,
    Follow,
    Message,
    Phase,
    ProgressReport,
    ScopeRequest,
    Start,
    Thaw,
    ToWorker,
    UnitAction,
    UnitDone,
    UnitRequest,
    cut,
)

PROGRESS_INTERVAL = 0.05    # seconds; the daemon passes on fewer
CHECK_INTERVAL = 0.1        # seconds, while the worker waits for another process
MAX_RESULT = 24 << 20   # bytes of all rows: more than a bus accepts, see ckptd.bus.wire
MAX_ROW = 64 << 10      # bytes of a row: half of it holds some 1500 open files of a process
_MAX_FDS = 253              # SCM_MAX_FD, include/net/scm.h

_encoder = msgspec.msgpack.Encoder()
_decode = msgspec.msgpack.Decoder(ToWorker).decode


def _encode(message: object) -> bytes:
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError:
        return _encoder.encode(_printable(msgspec.to_builtins(message, str_keys=True)))


def _printable(value: object) -> object:
    r"""Replace each byte that is not UTF-8 by '\\xff'. Messages are for people; the image has the bytes."""
    match value:
        case str():
            return value.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
        case dict():
            return {_printable(key): _printable(item) for key, item in value.items()}
        case list() | tuple():
            return [_printable(item) for item in value]
    return value


def _shortened(value: object) -> object:
    """Shorten a row above MAX_ROW: its texts to MAX_TEXT characters, its list to half of MAX_ROW."""
    match value:
        case str():
            return cut(value)
        case dict():
            return {key: _shortened(item) for key, item in value.items()}
        case list() | tuple():
            kept, size = [], 0
            for item in map(_shortened, value):
                size += len(_encode(item))
                if size > MAX_ROW // 2:
                    break
                kept.append(item)
            return kept
    return value


def stalled(what: str, seconds: float) -> CkptError:
    """Return the error of a stream that does not move."""
    return CkptError(f'{what} for {seconds:g} s', errno=errno.ETIMEDOUT, resource='StreamStallSec',
                     hint='try again, and keep the stream moving')


class Channel:
    """Owner of the socket and of the daemon's pidfd. The death of the daemon acts like a Cancel: the tree is released
    and nothing is finished."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)     # inherited from the daemon, but not passed on
        self._daemon = -1
        self._inputs = select.epoll()       # both
        self._inputs.register(self._socket, select.EPOLLIN)
        self._cancelled = False
        self._next_progress = 0.0
        self.phase_name = ''

    def fileno(self) -> int:
        """Return an fd for poll(2), readable when `receive` does not wait."""
        return self._inputs.fileno()

    def close(self) -> None:
        self._inputs.close()
        self._socket.close()
        if self._daemon >= 0:
            os.close(self._daemon)
            self._daemon = -1

    # ------------------------------------------------------------ in

    def receive(self) -> tuple[Message | None, list[int]]:
        """Wait for the next message. Return it with its fds; None at end-of-file."""
        # messages sent by the daemon before its death come first
        if self._socket.fileno() not in dict(self._inputs.poll()):
            return None, []
        try:
            data, ancillary, _, _ = self._socket.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(_MAX_FDS * 4),
                                                         socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:        # it ended with unread data of ours
            return None, []
        fds = array.array('i')
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[:len(payload) // fds.itemsize * fds.itemsize])
        return (_decode(data) if data else None), list(fds)

    def wait_start(self) -> tuple[Start, list[int]] | None:
        """Wait for the job. None if the daemon has none for this worker."""
        message, fds = self.receive()
        if isinstance(message, Follow):
            [self._daemon] = fds
            self._inputs.register(self._daemon, select.EPOLLIN)
            message, fds = self.receive()
        return (message, fds) if isinstance(message, Start) else None

    def wait_thaw(self) -> None:
        """Wait until the daemon asks for a thaw, or is gone."""
        while not isinstance(self.receive()[0], Thaw | Cancel | None):
            continue

    def check(self) -> None:
        """Raise Cancelled if the daemon sent Cancel or is gone. It costs one poll(2)."""
        if not self._cancelled and self._inputs.poll(0):
            message, fds = self.receive()
            for fd in fds:
                os.close(fd)
            self._cancelled = isinstance(message, Cancel | None)
        if self._cancelled:
            raise Cancelled('the job was cancelled', phase=self.phase_name)

    @property
    def cancelled(self) -> bool:
        """Whether a Cancel has been received."""
        return self._cancelled

    def cancel(self) -> None:
        """Cancel from a signal handler: the next `check` raises."""
        self._cancelled = True

    def wait_readable(self, fd: int, stall: float = 0.0) -> None:
        """Wait until a client's pipe or socket is readable or at its end. Cancelled; CkptError after `stall` seconds,
        if that is not 0."""
        end = time.monotonic() + stall
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._inputs, select.POLLIN)
        while True:
            self.check()
            # SIGTERM alone does not end poll(2) (PEP 475)
            if fd in dict(poll.poll(CHECK_INTERVAL * 1000)):
                return
            if stall and time.monotonic() > end:
                raise stalled('nothing arrived on the stream', stall)

    @contextmanager
    def interrupting(self, stall: float = 0.0) -> Iterator[None]:
        """Let a Cancel interrupt the block, even in a system call that waits for another process, on any kind of file.
        The same happens after `stall` seconds, if that is not 0, in which nothing was written.

        Cancelled or CkptError may come out of any statement of the block, so use it only for work that has nothing to
        undo.
        """
        written, since = -1, time.monotonic()

        def on_alarm(number: int, frame: FrameType | None) -> None:
            nonlocal written, since
            try:
                self.check()
                if stall and (now := bytes_written()) != written:
                    written, since = now, time.monotonic()
                elif stall and time.monotonic() - since > stall:
                    raise stalled('the stream was not read', stall)
            except CkptError:
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise

        signal.signal(signal.SIGALRM, on_alarm)
        # repeatedly, because one alarm may come between the check and the call that then waits
        signal.setitimer(signal.ITIMER_REAL, CHECK_INTERVAL, CHECK_INTERVAL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    # ------------------------------------------------------------ out

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message and wait for room. Cancelled when the daemon is gone."""
        data = _encode(message)
        try:
            while not self._send(data, fds):
                self._wait_room()
        except (BrokenPipeError, ConnectionResetError) as error:
            self._cancelled = True
            raise Cancelled('the daemon is gone', phase=self.phase_name) from error

    def _send(self, data: bytes, fds: Sequence[int]) -> bool:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else []
        try:
            self._socket.sendmsg([data], rights, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return True

    def _wait_room(self) -> None:
        """Wait for room. BrokenPipeError when the daemon dies, since no process reads any more."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        if self._daemon >= 0:
            poll.register(self._daemon, select.POLLIN)
        if self._daemon in dict(poll.poll()):
            raise BrokenPipeError

    def phase(self, name: str) -> None:
        self.phase_name = name
        self.check()
        self.send(Phase(name))

    def progress(self, tasks_done: int, tasks_total: int, bytes_done: int, bytes_total: int, *,
                 last: bool = False) -> None:
        """Report progress, at most twenty times a second, and check for a Cancel."""
        now = time.monotonic()
        if now < self._next_progress and not last:
            return
        self._next_progress = now + PROGRESS_INTERVAL
        self.check()
        self.send(ProgressReport(tasks_done, tasks_total, bytes_done, bytes_total))

    def finish(self, rows_name: str, rows: Sequence[object], result: dict[str, object] | None = None) -> None:
        """Send Finished, in as many packets as the rows need. A row that is too long is cut (_shortened).
        LimitsExceeded for more than MAX_RESULT in all."""
        head = dict(result or {})
        rest, room = list(rows), MAX_RESULT
        while True:
            taken, size = [], 1024 + len(_encode(head))
            while rest and size < MAX_MESSAGE // 2:
                if len(_encode(rest[0])) > MAX_ROW:
                    rest[0] = _shortened(rest[0])
                size += len(_encode(rest[0]))
                taken.append(rest.pop(0))
            room -= size
            if room < 0:
                raise LimitsExceeded(f'the result is larger than {MAX_RESULT:,} bytes', hint='ask about a subtree')
            self.send(Finished({**head, rows_name: taken} if rows_name else head, more=bool(rest)))
            if not rest:
                return
            head = {}

    def unit(self, unit: str, action: UnitAction) -> None:
        """Let the daemon ask systemd to freeze, thaw or stop a unit. CkptError with systemd's message if that fails."""
        self._ask(UnitRequest(unit, action), f'{action} {unit}', unit)

    def scope(self, scope: str, pids: Sequence[int], slice_: str = '') -> None:
        """Let the daemon ask systemd to make a scope of processes. CkptError with systemd's message if that fails."""
        self._ask(ScopeRequest(scope, tuple(pids), slice_), f'make {scope}', scope)

    def call(self, call: Message, fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """Call the broker and wait for its answer. Raises the broker's error; Cancelled if the broker is gone."""
        self.send(call, fds)
        while True:
            message, received = self.receive()
            match message:
                case Answer(failed=Failed() as failed):
                    raise failed.error()
                case Answer(value):
                    return value, received
                case Cancel():
                    self._cancelled = True
                case None:
                    self._cancelled = True
                    raise Cancelled('the broker is gone', phase=self.phase_name)

    def _ask(self, request: Message, what: str, resource: str) -> None:
        self.send(request)
        while True:
            message, _ = self.receive()
            if isinstance(message, UnitDone):
                if message.error:
                    raise CkptError(f'systemd cannot {what}: {message.error}', resource=resource,
                                    phase=self.phase_name)
                return
            if isinstance(message, Cancel | None):
                self._cancelled = True
                if message is None:
                    raise Cancelled('the daemon is gone', phase=self.phase_name)

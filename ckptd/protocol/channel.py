# SPDX-License-Identifier: LGPL-2.1-or-later
"""The worker's end of its socket: messages out, Cancel and end-of-file in; as which counts the daemon's pidfd, too."""

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
    UnitDone,
    UnitRequest,
    cut,
)

PROGRESS_INTERVAL = 0.05    # seconds; the daemon thins out what it sends on
CHECK_INTERVAL = 0.1        # seconds, of a worker that waits for somebody else
MAX_RESULT = 24 << 20   # bytes of all rows: more than a bus takes, see ckptd.bus.wire
MAX_ROW = 64 << 10      # bytes of a row: half of it are some 1500 open files of a process
_MAX_FDS = 253              # SCM_MAX_FD, include/net/scm.h

_encoder = msgspec.msgpack.Encoder()
_decode = msgspec.msgpack.Decoder(ToWorker).decode


def _encode(message: object) -> bytes:
    try:
        return _encoder.encode(message)
    except UnicodeEncodeError:
        return _encoder.encode(_printable(msgspec.to_builtins(message, str_keys=True)))


def _printable(value: object) -> object:
    """The same with each byte that is no UTF-8 as '\\xff': messages are for people, the image has the bytes."""
    match value:
        case str():
            return value.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
        case dict():
            return {_printable(key): _printable(item) for key, item in value.items()}
        case list() | tuple():
            return [_printable(item) for item in value]
    return value


def _shortened(value: object) -> object:
    """A row above MAX_ROW, cut: its texts at MAX_TEXT characters, its list at half of MAX_ROW."""
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
    """The error of a stream that does not move."""
    return CkptError(f'{what} for {seconds:g} s', errno=errno.ETIMEDOUT, resource='StreamStallSec',
                     hint='ask again, and keep the stream moving')


class Channel:
    """Owner of the socket and of the daemon's pidfd. A dead daemon is a Cancelled like any other: the tree is released,
    nothing is finished."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)     # it was inherited from the daemon, and goes no further
        self._daemon = -1
        self._inputs = select.epoll()       # both
        self._inputs.register(self._socket, select.EPOLLIN)
        self._cancelled = False
        self._next_progress = 0.0
        self.phase_name = ''

    def fileno(self) -> int:
        """For poll(2): readable when `receive` does not wait."""
        return self._inputs.fileno()

    def close(self) -> None:
        self._inputs.close()
        self._socket.close()
        if self._daemon >= 0:
            os.close(self._daemon)
            self._daemon = -1

    # ------------------------------------------------------------ in

    def receive(self) -> tuple[Message | None, list[int]]:
        """The next message and its fds, waiting for it; None at end-of-file."""
        # what the daemon said before its death comes first
        if self._socket.fileno() not in dict(self._inputs.poll()):
            return None, []
        try:
            data, ancillary, _, _ = self._socket.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(_MAX_FDS * 4),
                                                         socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:        # it has ended with something of ours unread
            return None, []
        fds = array.array('i')
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[:len(payload) // fds.itemsize * fds.itemsize])
        return (_decode(data) if data else None), list(fds)

    def wait_start(self) -> tuple[Start, list[int]] | None:
        """The job; None when the daemon has none for this worker."""
        message, fds = self.receive()
        if isinstance(message, Follow):
            [self._daemon] = fds
            self._inputs.register(self._daemon, select.EPOLLIN)
            message, fds = self.receive()
        return (message, fds) if isinstance(message, Start) else None

    def wait_thaw(self) -> None:
        """Wait until the daemon wants the tree back, or is gone."""
        while not isinstance(self.receive()[0], Thaw | Cancel | None):
            continue

    def check(self) -> None:
        """Cancelled if the daemon said so or is gone. Costs one poll(2)."""
        if not self._cancelled and self._inputs.poll(0):
            message, fds = self.receive()
            for fd in fds:
                os.close(fd)
            self._cancelled = isinstance(message, Cancel | None)
        if self._cancelled:
            raise Cancelled('the job was cancelled', phase=self.phase_name)

    @property
    def cancelled(self) -> bool:
        """The daemon has said so, as far as anything was received."""
        return self._cancelled

    def cancel(self) -> None:
        """From a signal handler: the next `check` raises."""
        self._cancelled = True

    def wait_readable(self, fd: int, stall: float = 0.0) -> None:
        """Wait until there is something to read from somebody else's pipe or socket, or its end. Cancelled; CkptError
        after `stall` seconds, if that is not 0."""
        end = time.monotonic() + stall
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._inputs, select.POLLIN)
        while True:
            self.check()
            # SIGTERM alone does not end poll(2): PEP 475
            if fd in dict(poll.poll(CHECK_INTERVAL * 1000)):
                return
            if stall and time.monotonic() > end:
                raise stalled('nothing has come', stall)

    @contextmanager
    def interrupting(self, stall: float = 0.0) -> Iterator[None]:
        """In the block, a Cancel ends also a system call that waits for somebody else, whatever kind of file it is on;
        and so do `stall` seconds, if that is not 0, in which nothing was written.

        Cancelled or CkptError may come out of any statement there: for work that has nothing to undo.
        """
        written, since = -1, time.monotonic()

        def on_alarm(number: int, frame: FrameType | None) -> None:
            nonlocal written, since
            try:
                self.check()
                if stall and (now := bytes_written()) != written:
                    written, since = now, time.monotonic()
                elif stall and time.monotonic() - since > stall:
                    raise stalled('nobody has read', stall)
            except CkptError:
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise

        signal.signal(signal.SIGALRM, on_alarm)
        # again and again, as one alarm may come between the last look at it and the call that then waits
        signal.setitimer(signal.ITIMER_REAL, CHECK_INTERVAL, CHECK_INTERVAL)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    # ------------------------------------------------------------ out

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send and wait for room; Cancelled when the daemon is gone."""
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
        """BrokenPipeError where the daemon dies: nobody reads any more."""
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
        """Tell the daemon, not more than twenty times a second, and look whether it wants to stop."""
        now = time.monotonic()
        if now < self._next_progress and not last:
            return
        self._next_progress = now + PROGRESS_INTERVAL
        self.check()
        self.send(ProgressReport(tasks_done, tasks_total, bytes_done, bytes_total))

    def finish(self, rows_name: str, rows: Sequence[object], result: dict[str, object] | None = None) -> None:
        """Finished, in as many packets as the rows need. A row that none has room for is cut (_shortened).
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
                raise LimitsExceeded(f'there is more to say than {MAX_RESULT:,} bytes hold', hint='ask about a subtree')
            self.send(Finished({**head, rows_name: taken} if rows_name else head, more=bool(rest)))
            if not rest:
                return
            head = {}

    def unit(self, unit: str, action: str) -> None:
        """Have the daemon ask systemd to freeze or thaw a unit. CkptError with systemd's words if it does not."""
        self._ask(UnitRequest(unit, 'freeze' if action == 'freeze' else 'thaw'), f'{action} {unit}', unit)

    def scope(self, scope: str, pids: Sequence[int], slice_: str = '') -> None:
        """The same to make a scope of processes."""
        self._ask(ScopeRequest(scope, tuple(pids), slice_), f'make {scope}', scope)

    def call(self, call: Message, fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """Have the broker do something, and wait for its answer. The error of the broker; Cancelled if it is gone."""
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
                    raise CkptError(f'systemd does not {what}: {message.error}', resource=resource,
                                    phase=self.phase_name)
                return
            if isinstance(message, Cancel | None):
                self._cancelled = True
                if message is None:
                    raise Cancelled('the daemon is gone', phase=self.phase_name)

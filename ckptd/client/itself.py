# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checkpoint the caller's own process tree: one blocking call, no event loop, nothing left open."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from ckptd.bus import wire
from ckptd.bus.client import as_ckpt_error
from ckptd.bus.connection import DRIVER, DRIVER_PATH, MAX_REPLY, error_of
from ckptd.bus.message import MessageType, ProtocolError
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from ckptd.bus.stream import MessageReader
from ckptd.bus.values import to_body
from ckptd.bus.wire import Received
from ckptd.errors import CkptError, Unavailable
from ckptd.kernel.stat import parse_stat
from ckptd.kernel.task import boot_id
from ckptd.kernel.yama import set_ptracer

__all__ = ['Outcome', 'checkpoint_self']

Outcome = Literal['checkpointed', 'restored']
LINE: Final = 4096          # bytes of a SASL answer, at most


def checkpoint_self(bus: str = 'system', **options: Any) -> Outcome:
    """Checkpoint the tree of the calling process: itself and all its descendants.

    bus: the bus of ckptd: 'system', 'session' or an address. options: those of Manager.CheckpointSelf: after='resume',
    'kill' or 'freeze', freeze=, timeout= in microseconds. Return 'checkpointed' when the image is published, and
    'restored' in a tree that came from it. CkptError: Refused with every reason, PermissionDenied, Unavailable without
    a ckptd.
    """
    before = _identity()
    try:
        with _connected(bus) as (sock, replies):
            _call(sock, replies, 1, DRIVER, DRIVER_PATH, DRIVER, 'Hello')
            with _traceable(sock, replies):
                _call(sock, replies, 2, BUS_NAME, ROOT, MANAGER, 'CheckpointSelf', 'a{sv}', options)
    except (EOFError, OSError) as error:
        # a restored process has lost the bus connection of its earlier life
        if _identity() != before:
            return 'restored'
        raise Unavailable(f'the bus is gone: {error}', hint='is the bus running?') from error
    except ProtocolError as error:
        raise CkptError(f'the bus sent a malformed message: {error}') from error
    return 'checkpointed'


@contextmanager
def _traceable(sock: socket.socket, replies: Iterator[Received]) -> Iterator[None]:
    """Let ckptd trace the calling process during the block, where Yama restricts that (PR_SET_PTRACER).

    This replaces a tracer that the program has declared itself. Child processes do not inherit the declaration; each
    has to make its own.
    """
    # no Yama; with Yama, this declares the process itself, which allows nothing new
    if not set_ptracer(os.getpid()):
        yield
        return
    try:
        set_ptracer(_daemon(sock, replies))     # this includes ckptd's descendants, such as the worker
        yield
    finally:
        set_ptracer(0)


def _daemon(sock: socket.socket, replies: Iterator[Received]) -> int:
    """Return the pid of ckptd. The bus starts it if it does not run."""
    try:
        [pid] = _call(sock, replies, 3, DRIVER, DRIVER_PATH, DRIVER, 'GetConnectionUnixProcessID', 's', BUS_NAME)
    except CkptError:       # no process owns the name
        _call(sock, replies, 4, DRIVER, DRIVER_PATH, DRIVER, 'StartServiceByName', 'su', BUS_NAME, 0)
        [pid] = _call(sock, replies, 5, DRIVER, DRIVER_PATH, DRIVER, 'GetConnectionUnixProcessID', 's', BUS_NAME)
    return int(pid)


def _identity() -> tuple[str, int]:
    """Return boot id and start time of this process. A restored process has others, even with the same pid."""
    return boot_id(), parse_stat(Path('/proc/self/stat').read_bytes()).start_time


@contextmanager
def _connected(bus: str) -> Iterator[tuple[socket.socket, Iterator[Received]]]:
    """Open a blocking socket, authenticate, and yield it with its incoming messages."""
    try:
        sock = _connect(bus)
    except (OSError, EOFError, ValueError) as error:
        raise Unavailable(f'cannot connect to the {bus} bus: {error}', hint='is the bus running?') from error
    with sock, closing(MessageReader(sock, lambda _: MAX_REPLY)) as reader:
        yield sock, _messages(reader)


def _connect(bus: str) -> socket.socket:
    names = wire.socket_names(wire.resolve_address(bus))
    for number, name in enumerate(names, 1):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(name)
            _authenticate(sock)
        except BaseException as error:
            sock.close()
            if number == len(names) or not isinstance(error, OSError):
                raise
        else:
            return sock
    raise OSError('its address has no unix socket')


def _authenticate(sock: socket.socket) -> None:
    """Authenticate by SASL EXTERNAL as the D-Bus specification defines it: the kernel tells the bus our uid."""
    sock.sendall(b'\0AUTH EXTERNAL %s\r\n' % str(os.geteuid()).encode().hex().encode())
    line = b''
    while not line.endswith(b'\r\n'):
        piece = sock.recv(1)
        if not piece or len(line) > LINE:
            raise EOFError('it closed the connection during authentication')
        line += piece
    if not line.startswith(b'OK '):
        raise OSError(f'it does not accept uid {os.geteuid()}: {line.decode("ascii", "replace").strip()}')
    sock.sendall(b'BEGIN\r\n')


def _messages(reader: MessageReader) -> Iterator[Received]:
    while True:
        yield from reader.messages()


def _call(sock: socket.socket, messages: Iterator[Received], serial: int, destination: str, path: str, interface: str,
          member: str, signature: str = '', *args: Any) -> Sequence[Any]:
    """Call a method and wait for its answer, however long that takes. Return its values or raise its CkptError."""
    call = wire.make_call(destination, path, interface, member, signature, to_body(signature, args))
    call.serial = serial
    sock.sendall(wire.marshal(call))
    for message in messages:
        try:
            if message.reply_serial != serial or message.type not in (MessageType.RETURN, MessageType.ERROR):
                continue        # a signal to us, such as NameAcquired
            if message.type == MessageType.ERROR:
                raise as_ckpt_error(error_of(message), path)
            return message.body()
        finally:
            message.fds.close()
    raise EOFError('the bus has closed the connection')

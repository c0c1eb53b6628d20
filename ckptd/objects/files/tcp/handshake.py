# SPDX-License-Identifier: LGPL-2.1-or-later
"""TCP connections of a restart: two sockets of ours with given addresses that connect to each other, and their data."""

import errno
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptd.errors import CkptError
from ckptd.kernel.inet import TCP_FIN_WAIT2, Address, address_of, sockaddr
from ckptd.kernel.sockopt import SO_BUF_LOCK
from ckptd.kernel.tcp import Stream, unsent
from ckptd.kernel.unix import SEND_SHUTDOWN
from ckptd.objects.files.inet.socket import not_bound, shut_down
from ckptd.objects.files.options import buffer_locks, set_buffer
from ckptd.objects.files.tcp.agreement import Agreement, complete, prepare


class MadeEnd(NamedTuple):
    """An end of a connection that is made."""
    family: int
    address: Address
    agreed: Agreement = Agreement()


_POLL = 0.002                   # seconds; nothing tells that a send queue is empty
_PATIENCE = 5.0                 # seconds for a handshake or for data, which loopback does at once
_STRANGERS = 64                 # connections of others that arrive at a listener which is there for a moment
_ANSWER = 1.0                   # seconds for the answer to a FIN
_TIME_WAIT = 3.0                # seconds: tcp_tw_reuse lets a loopback address be used again after one


def wait_until_sent(sock: socket.socket, seconds: float) -> int:
    """Wait until the peer has everything that was sent. Return the bytes that it lacks after that time."""
    deadline = time.monotonic() + seconds
    while (left := unsent(sock)) and time.monotonic() < deadline:
        time.sleep(_POLL)
    return left


def bound(family: int, address: Address, link: str) -> socket.socket:
    """Return a TCP socket with an address, which others of the tree may have as well. CkptError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(sockaddr(family, address.in_family(family)))
    except OSError as error:
        reason, hint = not_bound(sock, address, error)
        sock.close()
        raise CkptError(f'{link}: {reason}', errno=error.errno or errno.EIO, resource=link, hint=hint) from error
    return sock


def connect_pair(first: MadeEnd, second: MadeEnd, link: str) -> tuple[int, int]:
    """Connect two ends by a handshake. The one with the lower port accepts. Return their fds. CkptError."""
    if not 0 < second.address.port < (first.address.port or 1 << 16):
        accepted, client = _connect(first, second, link)
        return accepted, client
    accepted, client = _connect(second, first, link)
    return client, accepted


def _connect(server: MadeEnd, client: MadeEnd, link: str) -> tuple[int, int]:
    with bound(server.family, server.address, link) as listener, bound(client.family, client.address, link) as sock:
        try:
            prepare(listener, server.agreed)
            prepare(sock, client.agreed)
            listener.listen(_STRANGERS)
            target = address_of(listener.getsockname())
            own = address_of(sock.getsockname())
            connect_to(sock, target.in_family(client.family), link)
            listener.settimeout(_PATIENCE)
            for _ in range(_STRANGERS):
                accepted, name = listener.accept()
                found = address_of(name)
                if (found.plain, found.port) == (own.plain, own.port):
                    accepted.setblocking(True)
                    complete(accepted, server.agreed)
                    complete(sock, client.agreed)
                    return accepted.detach(), sock.detach()
                accepted.close()        # somebody else, who finds that port closed
        except OSError as error:
            raise _failed(server, client, link, error) from error
    raise _failed(server, client, link, TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))


def _failed(server: MadeEnd, client: MadeEnd, link: str, error: OSError) -> CkptError:
    return CkptError(f'{link}: {client.address} and {server.address} cannot be connected again: '
                     f'{error.strerror or error}', errno=error.errno or errno.ETIMEDOUT, resource=link,
                     hint='check that no packet filter is in between, and that no program uses these addresses')


def connect_to(sock: socket.socket, target: Address, link: str) -> None:
    """Connect a socket that has its address. CkptError."""
    deadline = time.monotonic() + _TIME_WAIT
    sock.settimeout(_PATIENCE)
    while True:
        try:
            sock.connect(sockaddr(sock.family, target))
            break
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
                raise CkptError(f'{link}: cannot connect to {target} again: {error.strerror or error}',
                                errno=error.errno or errno.ETIMEDOUT, resource=link,
                                hint='try again: an old connection of these addresses is in time-wait') from error
            time.sleep(50 * _POLL)
    sock.setblocking(True)


def send_all(sock: socket.socket, receiver: socket.socket, stream: Stream, link: str) -> None:
    """Send what `receiver` had not read. Its queue and the send queue get enough room for it. CkptError."""
    size = len(stream.data) + len(stream.urgent) + len(stream.later)
    if not size:
        return
    with roomy(sock, socket.SO_SNDBUF, 4 * size), roomy(receiver, socket.SO_RCVBUF, 4 * size):
        _send_stream(sock, stream, size, link)


def send_waiting(sock: socket.socket, stream: Stream, link: str) -> None:
    """Send what waits for a process that accepts the connection. The send queue gets enough room for it. CkptError."""
    size = len(stream.data) + len(stream.urgent) + len(stream.later)
    if size:
        with roomy(sock, socket.SO_SNDBUF, 4 * size):
            _send_stream(sock, stream, size, link)


@contextmanager
def roomy(sock: socket.socket, name: int, size: int) -> Iterator[None]:
    """Give a buffer that size in this block, as far as the user may."""
    before, locks = sock.getsockopt(socket.SOL_SOCKET, name), buffer_locks(sock)
    set_buffer(sock, name, max(before, size))
    try:
        yield
    finally:
        set_buffer(sock, name, before)
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locks)


def _send_stream(sock: socket.socket, stream: Stream, size: int, link: str) -> None:
    try:
        _send(sock, stream.data, 0)
        _send(sock, stream.urgent, socket.MSG_OOB)
        _send(sock, stream.later, 0)
    except OSError as error:
        full = isinstance(error, BlockingIOError)
        raise CkptError(f'{link}: {size:,} unread bytes cannot be sent again: {error.strerror}',
                        errno=errno.ENOBUFS if full else error.errno, resource=link,
                        hint='raise the sysctls net.core.wmem_max and rmem_max, or restore as root') from error


def _send(sock: socket.socket, data: bytes, flags: int) -> None:
    rest = memoryview(data)
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while rest:
        try:
            rest = rest[sock.send(rest, flags | socket.MSG_DONTWAIT):]
        except BlockingIOError:
            if not poll.poll(_PATIENCE * 1000):
                raise


class FirstFins:
    """The FINs of the ends that were closed first. They are sent before the answers to them.

    The answer to a FIN waits up to 200 ms for data to go with, also for a FIN of its own end. If a filter drops that
    one, the answer is lost too. So the first FINs have their answers before the others are sent.
    """

    def __init__(self) -> None:
        self._to_answer: list[int] = []

    def send(self, fd: int, state: int) -> None:
        """Send the FIN of an end. All its bytes are sent by now. state: the former one, TCP_*."""
        shut_down(fd, SEND_SHUTDOWN)
        if state == TCP_FIN_WAIT2:
            self._to_answer.append(fd)

    def await_answers(self) -> None:
        """Wait until the other ends have acknowledged what they had acknowledged before."""
        for fd in self._to_answer:
            with socket.socket(fileno=os.dup(fd)) as sock:
                wait_until_sent(sock, _ANSWER)
        self._to_answer.clear()

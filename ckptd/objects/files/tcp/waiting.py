# SPDX-License-Identifier: LGPL-2.1-or-later
"""TCP connections within the tree that wait to be accepted. Only accept(2) reaches what their clients have sent, so it
can be kept only if the tree is killed: all connections of such a listener are accepted then, last of all.

A restart connects the clients when the listeners listen, in their order, and they send again.
"""

import os
import select
import socket
import stat
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ckptd.kernel import tcp, unix
from ckptd.kernel.inet import Address, address_of, local_address
from ckptd.objects.files.base import Content, OpenFile, RestoreContext
from ckptd.objects.files.inet.socket import given_address, rights
from ckptd.objects.files.tcp.handshake import connect_to, send_waiting
from ckptd.objects.files.tcp.keep import keep_bytes, not_now
from ckptd.objects.files.tcp.record import TICK, TcpConnection, in_order
from ckptd.objects.files.tcp.table import plain

Ends = tuple[Address, Address]      # own address and that of the peer, of one end of a connection

_PIECE = 1 << 20                    # bytes
_POLL = 0.002                       # seconds; nothing tells that a send queue is empty
_PATIENCE = 5.0                     # seconds in which the kernel delivers what is on its way


class WaitingConnections:
    """The connections of one job that wait to be accepted."""

    def __init__(self) -> None:
        self._have_sent: dict[int, int] = {}        # by inode of a client: port of its listener
        self._servers: dict[int, list[OpenFile]] = {}   # by such a port: listeners
        self._taken: dict[int, dict[Ends, tuple[int, tcp.Stream]]] = {}   # by port and client: its place, its bytes
        self._to_connect: list[tuple[TcpConnection, int, str]] = []

    # ------------------------------------------------------------ dump

    def add_sender(self, file: OpenFile, peer: Address) -> None:
        """Note a client that has sent something. peer: the address of its listener."""
        self._have_sent[file.stat.st_ino] = peer.port

    def look_for_listener(self, peer: Address, content: Content) -> None:
        """Note the listeners that have a port, if some client of that port has sent something."""
        if peer.port in self._have_sent.values() and peer.port not in self._servers:
            self._servers[peer.port] = list(_listeners(peer.port, content))

    def take(self, record: TcpConnection, file: OpenFile, ends: Mapping[Ends, tuple[OpenFile, int]], content: Content
             ) -> TcpConnection:
        """Return the record of a client with what it has sent. ends: the ends of all connections in the tree."""
        peer = plain(given_address(record.peer[0], record.socket.family))
        if peer.port not in self._servers:
            return record
        if peer.port not in self._taken:
            found = enumerate(_accept_all(self._servers[peer.port], ends))
            self._taken[peer.port] = {pair: (place, stream) for place, (pair, stream) in found}
        own = plain(given_address(record.socket.bound[0], record.socket.family))
        if (own, peer) in self._taken[peer.port]:
            place, stream = self._taken[peer.port][own, peer]
            # the times of packets are no order any more, once some have sent
            return replace(record, since=TICK * place, data=keep_bytes(stream.data, content), urgent=stream.urgent,
                           later=keep_bytes(stream.later, content))
        if file.stat.st_ino in self._have_sent:
            raise not_now(file, f'{peer} has not got the connection yet')
        return record

    # ------------------------------------------------------------ restart

    def add_to_connect(self, record: TcpConnection, fd: int, link: str) -> None:
        """Note a client. fd: its socket, which has its address."""
        self._to_connect.append((record, fd, link))

    def connect_all(self, ctx: RestoreContext) -> None:
        """Connect the clients, once. The oldest connection is the first one to be accepted."""
        for one, fd, link in in_order(self._to_connect):
            with rights(ctx), socket.socket(fileno=os.dup(fd)) as sock:
                connect_to(sock, given_address(one.peer[0], one.socket.family), link)
                send_waiting(sock, stream_of(one, ctx), link)
            time.sleep(2 * TICK / 1000)        # so that the next checkpoint finds the same order
        self._to_connect.clear()


def stream_of(record: TcpConnection, ctx: RestoreContext) -> tcp.Stream:
    """Read from the image what an end has not read."""
    data, later = (b''.join(ctx.pread(extent, extent.length, 0) for extent in extents)
                   for extents in (record.data, record.later))
    return tcp.Stream(data, record.urgent[:1], later)


def _listeners(port: int, content: Content) -> Iterator[OpenFile]:
    """Yield the listeners of the tree that have a port."""
    for _, file in content.every():
        if stat.S_ISSOCK(file.stat.st_mode) and not file.is_path:
            with file.as_socket() as sock:
                if _listens(sock, port):
                    yield file


def _accept_all(servers: Iterable[OpenFile], ends: Mapping[Ends, tuple[OpenFile, int]]
                ) -> Iterator[tuple[Ends, tcp.Stream]]:
    """Accept the connections of listeners, as the tree is about to be killed. Yield those of the tree, with what their
    clients have sent. Others are reset, as they are when the listener is closed."""
    for file in servers:
        with file.as_socket() as listener:
            while unix.polls(listener, select.POLLIN):
                accepted, name = listener.accept()
                with accepted:
                    # its end leaves nothing that would hold the port
                    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('=ii', 1, 0))
                    pair = plain(address_of(name)), plain(local_address(accepted))
                    if pair in ends:
                        yield pair, _read_all(accepted, *ends[pair])


def _listens(sock: socket.socket, port: int) -> bool:
    return (sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
            and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)) and local_address(sock).port == port)


def _read_all(accepted: socket.socket, file: OpenFile, _: int) -> tcp.Stream:
    """Read all that a client has sent. What is read makes room for what has not been received. file: of the client.
    CkptError."""
    parts, urgent = [b'', b''], b''
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    deadline = time.monotonic() + _PATIENCE
    with file.as_socket() as client:
        while True:
            left, at_mark = tcp.unsent(client), tcp.at_mark(accepted)
            try:
                data = accepted.recv(_PIECE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not left:
                    break
                if time.monotonic() > deadline:
                    raise not_now(file, f'{left:,} bytes that it has sent did not arrive') from None
                time.sleep(_POLL)
                continue
            if not data:        # it has shut down
                break
            if at_mark:
                urgent, data = data[:1], data[1:]
            parts[bool(urgent)] += data
    return tcp.Stream(parts[0], urgent, parts[1])

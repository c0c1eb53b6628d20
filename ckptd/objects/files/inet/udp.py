# SPDX-License-Identifier: LGPL-2.1-or-later
"""A UDP (udp(7)) or UDP-Lite socket: fresh, bound, or connected.

The queue is read with MSG_PEEK, like that of a unix socket. A datagram from a socket of the tree is sent again by that
socket. Nobody else can send in the name of its sender, so datagrams from outside of the tree are lost, as a network may
lose them.
"""

import array
import fcntl
import os
import socket
import termios
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress

from ckptd.errors import CkptError, Finding, ImageDamaged
from ckptd.external import udp_peer
from ckptd.image.grammar import U8, Struct, layout
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel import unix, unix_queue
from ckptd.kernel.inet import Address, local_address, peer_address, sockaddr
from ckptd.objects.files.base import Content, Endpoint, FileEnd, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.inet.socket import (
    InetAddress,
    InetSocket,
    datagram_findings,
    dump_socket,
    foreign_findings,
    given_address,
    keep_address,
    make_datagram_socket,
    require_dumpable,
    shared_ports,
    shut_down,
    socket_type,
)
from ckptd.objects.files.inet.zerocopy import zerocopy_findings
from ckptd.objects.files.inherited import asked_for
from ckptd.objects.files.socket_filter import filter_findings, set_filter
from ckptd.objects.files.socket_queue import offset_to_restore, read_queue
from ckptd.objects.files.tables import JobTables
from ckptd.objects.support import Support

_PROTOCOLS = (socket.IPPROTO_UDP, socket.IPPROTO_UDPLITE)
_ANY = ('0.0.0.0', '::')


@layout
class Datagram(Struct):
    """An unread datagram. data: none for an empty one."""
    data: tuple[Extent, ...]
    sender: InetAddress


@layout
class UdpSocket(Struct):
    """A UDP socket. peer: none if it is not connected."""
    socket: InetSocket
    peer: tuple[InetAddress, ...]
    queue: tuple[Datagram, ...]
    shutdown: U8                    # RCV_SHUTDOWN and SEND_SHUTDOWN of <net/sock.h>


class UdpKind(Kind[UdpSocket], tag='udp'):
    support = Support('UDP and UDP-Lite sockets, with datagrams of the tree that wait in them',
                      refused='unfinished datagrams (UDP_CORK), eBPF filters',
                      warned='datagrams from outside of the tree, pending errors, programs of SO_REUSEPORT groups',
                      user='ports and options that need a right are refused')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._queues: dict[int, list[unix_queue.Queued]] = {}       # by inode, each read once
        self._bound: set[tuple[str, int]] = set()                   # addresses of the sockets of the tree

    def matches(self, file: OpenFile) -> bool:
        kind = socket_type(file, self._tables)
        return kind is not None and kind.type == socket.SOCK_DGRAM and kind.protocol in _PROTOCOLS and (
            kind.family in (socket.AF_INET, socket.AF_INET6))

    def findings(self, file: OpenFile) -> list[Finding]:
        kind = socket_type(file, self._tables)
        if kind and (found := foreign_findings(file, kind)):
            return found
        with file.as_socket() as sock:
            found = [*_state_findings(file, sock), *zerocopy_findings(file, sock), *filter_findings(sock, file.link)]
        if what := self.inherited(file):
            found.append(finding('ECONNRESET', f'{file.link} is a UDP socket that is connected to {what}',
                                 asked_for(what), 'warning'))
        return found

    def inherited(self, file: OpenFile) -> str:
        with file.as_socket() as sock:
            peer = peer_address(sock)
        what = udp_peer(peer.plain, peer.port) if peer else ''
        return what if self._tables.external.inherits(what) else ''

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        kind = socket_type(file, self._tables)
        if kind is None or kind.foreign:
            return None
        with file.as_socket() as sock:
            own = local_address(sock)
            shared = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        self._bound.add((own.plain, own.port))
        # a socket that shares its address with none has an end of its own
        key = zlib.crc32(own.host.encode()) if shared else file.stat.st_ino
        return Endpoint((self.tag, own.port, key), frozenset({str(file.stat.st_ino)}), frozenset())

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        yield from shared_ports(ends)
        for end in ends:
            lost = sum(not self._is_inside(one) for one in self._queues.get(end.file.stat.st_ino, ()))
            if lost:
                yield end, finding('ENODATA', f'{lost} unread datagrams in {end.file.link} come from outside of the '
                                   'tree', 'a restart loses them, as a network may', 'warning')

    def _is_inside(self, one: unix_queue.Queued) -> bool:
        sender = _sender(one)
        return any((host, sender.port) in self._bound for host in (sender.plain, *_ANY))

    def peek_offset(self, file: OpenFile) -> int | None:
        return offset_to_restore(file)

    def discover(self, file: OpenFile) -> Sequence[int]:
        if file.stat.st_ino not in self._queues:
            self._queues[file.stat.st_ino] = read_queue(file)
        return ()

    def dump(self, file: OpenFile, content: Content) -> UdpSocket:
        require_dumpable(file, self.findings(file))
        with file.as_socket() as sock:
            peer = peer_address(sock)
            common = dump_socket(file, sock, is_connected=peer is not None)
        queue = tuple(Datagram((content.add([one.data]),) if one.data else (), keep_address(_sender(one)))
                      for one in self._queues.get(file.stat.st_ino, ()) if self._is_inside(one))
        known = self._tables.inet_sockets(common.protocol).get(file.stat.st_ino)
        return UdpSocket(common, (keep_address(peer),) if peer else (), queue, known.shutdown if known else 0)

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: UdpSocket, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        return datagram_findings(record.socket, record.peer, saved, lookup)

    def create(self, record: UdpSocket, saved: SavedFile, ctx: RestoreContext) -> int:
        with make_datagram_socket(record.socket, record.peer, saved, ctx) as sock:
            own = local_address(sock)
            ctx.once(('udp', own.plain, own.port), lambda: os.dup(sock.fileno()))
            return sock.detach()

    def connect(self, record: UdpSocket, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            self._fill(record, saved, local_address(sock), ctx)
            set_filter(sock, record.socket.filter, saved.link)

    def _fill(self, record: UdpSocket, saved: SavedFile, own: Address, ctx: RestoreContext) -> None:
        for one in record.queue:
            sender = given_address(one.sender, record.socket.family)
            target = Address(sender.host, own.port, 0, sender.scope) if own.host in _ANY else own
            data = b''.join(ctx.pread(extent, extent.length, 0) for extent in one.data)
            _send(data, target, _sender_socket(sender, saved, ctx), saved)

    def commit(self, record: UdpSocket, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        shut_down(fd, record.shutdown)


def _state_findings(file: OpenFile, sock: socket.socket) -> Iterator[Finding]:
    waiting = array.array('i', [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, waiting)
    if waiting[0]:
        yield finding('EAGAIN', f'{file.link} has an unfinished datagram (UDP_CORK, MSG_MORE), which nothing reads, or '
                      'datagrams that a device has not sent', 'try again later, or let the program finish it')
    if not unix.has_error(sock):
        return
    if unix.is_empty(sock):
        yield finding('ENODATA', f'{file.link} has a pending error, or messages in its error queue (IP_RECVERR)',
                      'a restart loses them, as a network may', 'warning')
    else:
        yield finding('EIO', f'{file.link} has a pending error, which reading its queue would consume',
                      'let the program read it (SO_ERROR) before the checkpoint')


def _sender(one: unix_queue.Queued) -> Address:
    return one.sender_address or Address('', 0)


def _sender_socket(sender: Address, saved: SavedFile, ctx: RestoreContext) -> int:
    """Return the fd of the tree's socket with an address."""
    for host in (sender.plain, *_ANY):
        with suppress(KeyError):
            return ctx.once(('udp', host, sender.port), _unknown)
    raise ImageDamaged(f'{saved.link} has a datagram from {sender}, which no socket of the image has')


def _unknown() -> int:
    raise KeyError


def _send(data: bytes, target: Address, fd: int, saved: SavedFile) -> None:
    with socket.socket(fileno=os.dup(fd)) as sock:
        try:
            sock.sendto(data, socket.MSG_DONTWAIT, sockaddr(sock.family, target.in_family(sock.family)))
        except OSError as error:
            raise CkptError(f'{saved.link}: a datagram cannot be sent again: {error.strerror}', errno=error.errno,
                            resource=saved.link) from error

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A raw socket (raw(7)) or a ping socket (icmp(7)). What it has not read yet is lost: nobody can send it again."""

import os
import socket
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.grammar import U8, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel import unix
from ckptd.kernel.inet import peer_address, raw_peers
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.inet.socket import (
    InetAddress,
    InetSocket,
    datagram_findings,
    dump_socket,
    foreign_findings,
    keep_address,
    make_datagram_socket,
    require_dumpable,
    shut_down,
    socket_type,
)
from ckptd.objects.files.socket_filter import filter_findings, set_filter
from ckptd.objects.support import Support

_PING = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)


@layout
class RawSocket(Struct):
    """A raw or ping socket. peer: none if it is not connected."""
    socket: InetSocket
    peer: tuple[InetAddress, ...]
    shutdown: U8                    # RCV_SHUTDOWN and SEND_SHUTDOWN of <net/sock.h>


class RawKind(Kind[RawSocket], tag='raw'):
    support = Support('raw and ping sockets', refused='eBPF filters', warned='unread packets, pending errors',
                      user='raw sockets are refused')

    def matches(self, file: OpenFile) -> bool:
        kind = socket_type(file, self._tables)
        return kind is not None and kind.family in (socket.AF_INET, socket.AF_INET6) and (
            kind.type == socket.SOCK_RAW or (kind.type == socket.SOCK_DGRAM and kind.protocol in _PING))

    def findings(self, file: OpenFile) -> list[Finding]:
        kind = socket_type(file, self._tables)
        if kind and (found := foreign_findings(file, kind)):
            return found
        with file.as_socket() as sock:
            return [*_losses(file, sock), *filter_findings(sock, file.link)]

    def dump(self, file: OpenFile, content: Content) -> RawSocket:
        require_dumpable(file, self.findings(file))
        with file.as_socket() as sock:
            peer = peer_address(sock) or raw_peers().get(file.stat.st_ino)
            common = dump_socket(file, sock, is_connected=peer is not None)
        known = self._tables.inet_sockets(common.protocol).get(file.stat.st_ino)
        return RawSocket(common, (keep_address(peer),) if peer else (), known.shutdown if known else 0)

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: RawSocket, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        return datagram_findings(record.socket, record.peer, saved, lookup)

    def create(self, record: RawSocket, saved: SavedFile, ctx: RestoreContext) -> int:
        return make_datagram_socket(record.socket, record.peer, saved, ctx).detach()

    def connect(self, record: RawSocket, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            set_filter(sock, record.socket.filter, saved.link)

    def commit(self, record: RawSocket, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        shut_down(fd, record.shutdown)


def _losses(file: OpenFile, sock: socket.socket) -> Iterator[Finding]:
    if not unix.is_empty(sock):
        yield finding('ENODATA', f'{file.link} has unread packets', 'a restart loses them, as a network may', 'warning')
    if unix.has_error(sock):
        yield finding('ENODATA', f'{file.link} has a pending error, or messages in its error queue (IP_RECVERR)',
                      'a restart loses them, as a network may', 'warning')

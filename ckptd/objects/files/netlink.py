# SPDX-License-Identifier: LGPL-2.1-or-later
"""A netlink socket (netlink(7)) without unread messages: its port, groups and options."""

import os
import socket
from collections.abc import Iterator

from ckptd.errors import CkptError, Finding, errno_name
from ckptd.image.grammar import U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel import netlink_options as netlink
from ckptd.kernel import unix
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import set_owner, socket_findings
from ckptd.objects.files.inet.socket import foreign_findings, require_dumpable, rights, socket_type
from ckptd.objects.files.options import SocketOption, dump_options, set_options
from ckptd.objects.files.socket_filter import SocketFilter, dump_filter, filter_findings, set_filter
from ckptd.objects.support import Support

_OPTIONS = (netlink.NETLINK_PKTINFO, netlink.NETLINK_BROADCAST_ERROR, netlink.NETLINK_NO_ENOBUFS,
            netlink.NETLINK_LISTEN_ALL_NSID, netlink.NETLINK_CAP_ACK, netlink.NETLINK_EXT_ACK,
            netlink.NETLINK_GET_STRICT_CHK)
_HIGHEST = (1 << 31) - 1


@layout
class NetlinkSocket(Struct):
    """A netlink socket. port: 0 if it is not bound. peer, peer_groups: of connect(2), 0 for the kernel."""
    type: U32
    protocol: U32
    uid: U32                            # of the socket itself (fchown(2))
    gid: U32                            # likewise
    port: U32
    groups: tuple[U32, ...]
    peer: U32
    peer_groups: U32
    options: tuple[SocketOption, ...]   # SOL_SOCKET
    switches: tuple[U32, ...]           # options of SOL_NETLINK that are on
    filter: SocketFilter


class NetlinkKind(Kind[NetlinkSocket], tag='netlink'):
    support = Support('netlink sockets', refused='unread messages, eBPF filters',
                      user='protocols and groups that need a right are refused')

    def matches(self, file: OpenFile) -> bool:
        kind = socket_type(file, self._tables)
        return kind is not None and kind.family == socket.AF_NETLINK

    def findings(self, file: OpenFile) -> list[Finding]:
        kind = socket_type(file, self._tables)
        if kind and (found := foreign_findings(file, kind)):
            return found
        with file.as_socket() as sock:
            return [*_unread(file, sock), *filter_findings(sock, file.link)]

    def dump(self, file: OpenFile, content: Content) -> NetlinkSocket:
        require_dumpable(file, self.findings(file))
        with file.as_socket() as sock:
            (port, _), (peer, peer_groups) = sock.getsockname(), sock.getpeername()
            switches = tuple(name for name in _OPTIONS if _is_on(sock, name))
            return NetlinkSocket(sock.type, sock.proto, file.stat.st_uid, file.stat.st_gid, port,
                                 netlink.memberships(sock), peer, peer_groups, dump_options(sock), switches,
                                 dump_filter(sock))

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: NetlinkSocket, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        found = socket_findings(saved.link, record.uid, record.gid, lookup)
        try:
            with rights(lookup):
                _make(record, saved.link).close()
        except CkptError as error:
            found.append(finding(errno_name(error.errno), error.message, error.hint))
        return found

    def create(self, record: NetlinkSocket, saved: SavedFile, ctx: RestoreContext) -> int:
        with rights(ctx), _make(record, saved.link) as sock:
            set_owner(sock.fileno(), saved.mode, record.uid, record.gid, ctx)
            return sock.detach()

    def connect(self, record: NetlinkSocket, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            set_filter(sock, record.filter, saved.link)


def _make(record: NetlinkSocket, link: str) -> socket.socket:
    try:
        sock = socket.socket(socket.AF_NETLINK, min(record.type, _HIGHEST), min(record.protocol, _HIGHEST))
        try:
            set_options(sock, record.options, link)
            for name in record.switches:
                sock.setsockopt(netlink.SOL_NETLINK, min(name, _HIGHEST), 1)
            if record.port:
                sock.bind((record.port, 0))
            for group in record.groups:
                sock.setsockopt(netlink.SOL_NETLINK, netlink.NETLINK_ADD_MEMBERSHIP, min(group, _HIGHEST))
            if record.peer or record.peer_groups:
                sock.connect((record.peer, record.peer_groups))
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        hint = 'restore it as root' if isinstance(error, PermissionError) else 'stop the program that has the port'
        raise CkptError(f'{link}: a netlink socket of protocol {record.protocol} with port {record.port} cannot be '
                        f'made again: {error.strerror}', errno=error.errno, resource=link, hint=hint) from error
    return sock


def _is_on(sock: socket.socket, name: int) -> bool:
    try:
        return bool(sock.getsockopt(netlink.SOL_NETLINK, name))
    except OSError:     # ENOPROTOOPT: an older kernel
        return False


def _unread(file: OpenFile, sock: socket.socket) -> Iterator[Finding]:
    if unix.has_error(sock) or not unix.is_empty(sock):
        yield finding('EAGAIN', f'{file.link} is a netlink socket with unread messages or a pending error (ENOBUFS)',
                      'try again when the program has read them')

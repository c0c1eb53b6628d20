# SPDX-License-Identifier: LGPL-2.1-or-later
"""A packet socket (packet(7)): its protocol, interface, memberships, fanout group, options and filter. Packets that it
has not read yet are lost: no program can send them again. Only a process with CAP_NET_RAW can make one."""

import errno
import os
import socket
from collections.abc import Iterator

from ckptd.errors import CkptError, Finding, ImageDamaged, errno_name
from ckptd.image.grammar import U16, U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel import packet, unix
from ckptd.kernel.packet import LinkMembership, PacketSocket, packet_sockets
from ckptd.kernel.sockopt import SO_BINDTOIFINDEX, SO_INCOMING_CPU
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import set_owner, socket_findings
from ckptd.objects.files.inet.socket import foreign_findings, require_dumpable, rights, socket_type
from ckptd.objects.files.options import SocketOption, dump_options, set_options
from ckptd.objects.files.socket_filter import SocketFilter, dump_filter, filter_findings, set_filter
from ckptd.objects.support import Support

_TYPES = (socket.SOCK_RAW, socket.SOCK_DGRAM, packet.SOCK_PACKET)
# options of SOL_PACKET that getsockopt(2) returns as an int; those that PACKET_VERSION changes come after it
_OPTIONS = (packet.PACKET_VERSION, packet.PACKET_RESERVE, packet.PACKET_LOSS, packet.PACKET_VNET_HDR_SZ,
            packet.PACKET_VNET_HDR, packet.PACKET_AUXDATA, packet.PACKET_ORIGDEV, packet.PACKET_TIMESTAMP,
            packet.PACKET_TX_HAS_OFF, packet.PACKET_QDISC_BYPASS, packet.PACKET_IGNORE_OUTGOING)
# the size of the header sets both
_SAME = {packet.PACKET_VNET_HDR: packet.PACKET_VNET_HDR_SZ}
# of SOL_SOCKET; the interface is kept by its name, and the CPU is that of the last packet
_NOT_KEPT = (SO_BINDTOIFINDEX, SO_INCOMING_CPU)
_HIGHEST = (1 << 31) - 1
_PROGRAMS = (packet.PACKET_FANOUT_CBPF, packet.PACKET_FANOUT_EBPF)
_MOST_JOINS = 1 << 16


@layout
class PacketOption(Struct):
    """An option of SOL_PACKET that differs from a fresh socket."""
    name: U32
    value: U32


@layout
class PacketMembership(Struct):
    """A membership (PACKET_ADD_MEMBERSHIP). type: PACKET_MR_*. count: how often it was joined."""
    interface: str
    type: U16
    address: bytes
    count: U32


@layout
class RawPacketSocket(Struct):
    """A packet socket. protocol: in host byte order, 0 for none. interface: '' for all. fanout: none, or id, type and
    flags as PACKET_FANOUT takes them."""
    type: U32
    uid: U32                            # of the socket itself (fchown(2))
    gid: U32                            # likewise
    protocol: U16
    interface: str
    copy_threshold: U32                 # PACKET_COPY_THRESH
    memberships: tuple[PacketMembership, ...]
    fanout: tuple[U32, ...]
    options: tuple[SocketOption, ...]   # SOL_SOCKET
    packet_options: tuple[PacketOption, ...]
    filter: SocketFilter


class PacketKind(Kind[RawPacketSocket], tag='packet'):
    support = Support('packet sockets, with their memberships and fanout groups',
                      refused='rings, eBPF filters, fanout groups with a program',
                      warned='unread packets, pending errors',
                      user='refused')

    def matches(self, file: OpenFile) -> bool:
        kind = socket_type(file, self._tables)
        return kind is not None and kind.family == socket.AF_PACKET

    def findings(self, file: OpenFile) -> list[Finding]:
        kind = socket_type(file, self._tables)
        if kind and (found := foreign_findings(file, kind)):
            return found
        with file.as_socket() as sock:
            return [*_state_findings(file, sock), *filter_findings(sock, file.link)]

    def dump(self, file: OpenFile, content: Content) -> RawPacketSocket:
        require_dumpable(file, self.findings(file))
        known = packet_sockets()[file.stat.st_ino]
        with file.as_socket() as sock:
            plain = tuple(one for one in dump_options(sock) if one.name not in _NOT_KEPT)
            options = tuple(PacketOption(name, value) for name, value in _read_options(sock).items() if value)
            fanout = () if known.fanout is None else (sock.getsockopt(packet.SOL_PACKET, packet.PACKET_FANOUT)
                                                      & 0xFFFFFFFF,)
            saved_filter = dump_filter(sock)
        joined = tuple(PacketMembership(socket.if_indextoname(one.interface), one.type, one.address, one.joins)
                       for one in reversed(known.memberships))
        return RawPacketSocket(sock.type, file.stat.st_uid, file.stat.st_gid, known.protocol,
                               _interface(known), known.copy_threshold, joined, fanout, plain, options, saved_filter)

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: RawPacketSocket, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        found = socket_findings(saved.link, record.uid, record.gid, lookup)
        try:
            with rights(lookup):
                _make(record, saved.link).close()
        except CkptError as error:
            found.append(finding(errno_name(error.errno), error.message, error.hint))
        return found

    def create(self, record: RawPacketSocket, saved: SavedFile, ctx: RestoreContext) -> int:
        with rights(ctx), _make(record, saved.link) as sock:
            set_owner(sock.fileno(), saved.mode, record.uid, record.gid, ctx)
            return sock.detach()


def _state_findings(file: OpenFile, sock: socket.socket) -> Iterator[Finding]:
    try:
        known = packet_sockets().get(file.stat.st_ino)
    except OSError as error:
        yield finding('EOPNOTSUPP', f'{file.link} is a packet socket, of which sock_diag(7) says nothing: '
                      f'{error.strerror}', 'use a kernel with CONFIG_PACKET_DIAG, or load the module af_packet_diag')
        return
    if known is None:
        yield finding('EAGAIN', f'{file.link} is a packet socket that is being closed', 'try again')
        return
    if known.has_ring:
        yield finding('EOPNOTSUPP', f'{file.link} is a packet socket with a ring (PACKET_RX_RING, PACKET_TX_RING)',
                      'close it before the checkpoint')
    if known.fanout is not None and known.fanout >> 16 in _PROGRAMS:
        yield finding('EOPNOTSUPP', f'{file.link} is in a fanout group that a program distributes '
                      '(PACKET_FANOUT_CBPF, _EBPF), which nothing reads', 'close it before the checkpoint')
    if not unix.is_empty(sock):
        yield finding('ENODATA', f'{file.link} has unread packets', 'a restart loses them', 'warning')
    if unix.has_error(sock):
        yield finding('ENODATA', f'{file.link} has a pending error, or time stamps in its error queue',
                      'a restart loses them', 'warning')


def _interface(known: PacketSocket) -> str:
    return socket.if_indextoname(known.interface) if known.interface else ''


def _read_options(sock: socket.socket) -> dict[int, int]:
    """Return the options that this kernel has."""
    found: dict[int, int] = {}
    for name in _OPTIONS:
        try:
            value = sock.getsockopt(packet.SOL_PACKET, name)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT and sock.type != packet.SOCK_PACKET:   # which has none of them
                raise
            continue
        if _SAME.get(name) not in found:
            found[name] = value
    return found


# ---------------------------------------------------------------- restart

def _make(record: RawPacketSocket, link: str) -> socket.socket:
    """Make a socket that gets no packet before everything is set. CkptError."""
    if record.type not in _TYPES:
        raise ImageDamaged(f'{link} is a packet socket of type {record.type}')
    what = 'made'
    try:
        # a socket of protocol 0 gets no packets
        protocol = socket.htons(record.protocol) if record.type == packet.SOCK_PACKET else 0
        sock = socket.socket(socket.AF_PACKET, record.type, protocol)
        try:
            what = 'given its options'
            _set_options(sock, record, link)
            what = f'bound to the interface {record.interface or "(all)"}'
            if record.interface or record.type != packet.SOCK_PACKET:
                packet.bind(sock, record.interface, record.protocol)
            what = 'put into its fanout group'
            for value in record.fanout:
                sock.setsockopt(packet.SOL_PACKET, packet.PACKET_FANOUT, value.to_bytes(4, 'little'))
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise CkptError(f'{link}: a packet socket cannot be {what}: {error.strerror}', errno=error.errno,
                        resource=link, hint=_hint(error)) from error
    return sock


def _hint(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return 'restore it as root'
    return 'restore it where that interface exists' if error.errno == errno.ENODEV else 'see packet(7)'


def _set_options(sock: socket.socket, record: RawPacketSocket, link: str) -> None:
    set_options(sock, record.options, link)
    for option in record.packet_options:
        if option.name not in _OPTIONS:
            raise ImageDamaged(f'{link} has the option {option.name} of packet sockets, which no checkpoint keeps')
        sock.setsockopt(packet.SOL_PACKET, option.name, option.value.to_bytes(4, 'little'))
    if record.copy_threshold:
        sock.setsockopt(packet.SOL_PACKET, packet.PACKET_COPY_THRESH, record.copy_threshold.to_bytes(4, 'little'))
    set_filter(sock, record.filter, link)
    for one in record.memberships:
        if not 0 < one.count <= _MOST_JOINS or len(one.address) > packet.MAX_ADDR_LEN or len(one.interface) > 15:
            raise ImageDamaged(f'{link} has a membership of {one.count} joins and {len(one.address)} bytes')
        group = LinkMembership(_index(one.interface), one.count, one.type, one.address)
        for _ in range(one.count):
            packet.join(sock, group)


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError as error:        # without an errno
        raise OSError(errno.ENODEV, f'{os.strerror(errno.ENODEV)} ({interface})') from error

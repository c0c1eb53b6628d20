# SPDX-License-Identifier: LGPL-2.1-or-later
"""Common parts of all internet sockets (ip(7), ipv6(7)): addresses, options, multicast groups, an owner.

A restart makes them with the rights of the user, so the kernel decides about raw sockets, ports below 1024 and options.
The plan makes each socket once for a moment, so a dry run says what the restart would say.
"""

import errno
import os
import socket
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NamedTuple

from ckptd.errors import CkptError, Finding, ImageDamaged, Refused, errno_name
from ckptd.image.grammar import U8, U16, U32, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel import multicast, unix
from ckptd.kernel.inet import STATES, Address, local_address, netns_cookie, sockaddr
from ckptd.kernel.inet_diag import inet_sockets
from ckptd.objects.files.base import Endpoint, FileEnd, FileLookup, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import set_owner, socket_findings
from ckptd.objects.files.inet.options import InetOptions, dump_inet_options, set_inet_options, settle_options
from ckptd.objects.files.options import dump_options
from ckptd.objects.files.socket_filter import SocketFilter, dump_filter
from ckptd.objects.files.tables import JobTables

_HIGHEST_FLOW = 0xFFFFF
_OWN = 'stop the program that has it, or wait a minute if it is closed'


@layout
class InetAddress(Struct):
    """An address. host: as inet_ntop(3) writes it. flow, scope: of IPv6; scope is the number of an interface."""
    host: str
    port: U16
    flow: U32
    scope: U32


@layout
class MulticastGroup(Struct):
    """A membership (ip(7)). include: only these sources, else all but these."""
    family: U32
    interface: str
    address: str
    include: U8
    sources: tuple[str, ...]


@layout
class InetSocket(Struct):
    """The common part of all internet sockets."""
    family: U32
    type: U32
    protocol: U32
    uid: U32                            # of the socket itself (fchown(2))
    gid: U32                            # likewise
    bound: tuple[InetAddress, ...]      # none if it has no address yet
    options: InetOptions
    groups: tuple[MulticastGroup, ...]
    filter: SocketFilter


class SocketType(NamedTuple):
    """The arguments of socket(2) that made a socket. foreign: it belongs to another network namespace than ours."""
    family: int
    type: int
    protocol: int
    foreign: bool


def socket_type(file: OpenFile, tables: JobTables) -> SocketType | None:
    """Return the type of a socket; None for another file, or one that we may not inspect."""
    if not stat.S_ISSOCK(file.stat.st_mode) or file.is_path or file.severed:
        return None
    known, inode = tables.socket_types, file.stat.st_ino
    if inode not in known:
        known[inode] = None
        with suppress(OSError), file.as_socket() as sock:
            # a kernel without cookies has 0 for both
            with socket.socket(socket.AF_UNIX) as ours:
                foreign = netns_cookie(sock) != netns_cookie(ours)
            known[inode] = SocketType(sock.family, sock.type, sock.proto, foreign)
    return known[inode]


def foreign_findings(file: OpenFile, kind: SocketType) -> list[Finding]:
    """Return a refusal of a socket of another network namespace."""
    if not kind.foreign:
        return []
    return [finding('EXDEV', f'{file.link} is a socket of another network namespace',
                    'checkpoint from within that namespace, or close it before the checkpoint')]


def keep_address(address: Address) -> InetAddress:
    return InetAddress(*address)


def given_address(record: InetAddress, family: int) -> Address:
    """Return an address of the image. ImageDamaged: a name would be looked up in the DNS."""
    try:
        socket.inet_pton(family, record.host)
    except (OSError, ValueError):
        raise ImageDamaged(f'{record.host!r} is no address of family {family}') from None
    if record.flow > _HIGHEST_FLOW:
        raise ImageDamaged(f'{record.flow} is no flow label')
    return Address(record.host, record.port, record.flow, record.scope)


def dump_socket(file: OpenFile, sock: socket.socket, *, is_connected: bool = False) -> InetSocket:
    own, of = local_address(sock), file.stat
    if sock.type == socket.SOCK_RAW:
        own = own._replace(port=0)      # getsockname(2) returns the protocol there
    own = _as_bound(sock, own)
    options = dump_inet_options(sock, dump_options(sock), is_connected=is_connected)
    return InetSocket(sock.family, sock.type, sock.proto, of.st_uid, of.st_gid,
                      () if own.is_any else (keep_address(own),), options, tuple(_groups(sock)), dump_filter(sock))


def _as_bound(sock: socket.socket, own: Address) -> Address:
    """Return the address that was given to bind(2). A datagram socket that is bound to all addresses gets one of them
    when it is connected. bind(2) to a single one, if it is not an IPv4 address, sets IPV6_V6ONLY
    (net/ipv6/af_inet6.c)."""
    if sock.family != socket.AF_INET6 or sock.type == socket.SOCK_STREAM or own.is_any or (
            own.host.startswith('::ffff:') or sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)):
        return own
    return own._replace(host='::', scope=0)


def _groups(sock: socket.socket) -> Iterator[MulticastGroup]:
    if sock.type == socket.SOCK_STREAM:
        return
    for group in multicast.groups_of_machine():
        if group.family == socket.AF_INET6 and sock.family == socket.AF_INET:
            continue
        if found := multicast.membership(sock, group):
            yield MulticastGroup(group.family, socket.if_indextoname(group.interface), group.address,
                                 found.mode == multicast.MCAST_INCLUDE, found.sources)


def port_endpoint(file: OpenFile, sock: socket.socket, protocol: str) -> Endpoint | None:
    """Return the end that joins all sockets of an address (SO_REUSEPORT); None for a socket that shares it with
    none."""
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return None
    own = local_address(sock)
    return Endpoint((protocol, own.port, zlib.crc32(own.host.encode())), frozenset({str(file.stat.st_ino)}),
                    frozenset())


def shared_ports(ends: Sequence[FileEnd]) -> Iterator[tuple[FileEnd, Finding]]:
    """Yield a warning for each address that several sockets share. ends: with the results of `port_endpoint`."""
    groups: dict[tuple[str, int, int], dict[int, FileEnd]] = {}
    for end in ends:
        groups.setdefault(end.endpoint.key, {})[end.file.stat.st_ino] = end
    for (protocol, port, _), sockets in groups.items():
        if len(sockets) > 1:
            yield next(iter(sockets.values())), finding(
                'ENODATA', f'{len(sockets)} sockets share {protocol.upper()} port {port} (SO_REUSEPORT)',
                'a program that chooses among them (SO_ATTACH_REUSEPORT_CBPF or _EBPF) is lost; nothing tells whether '
                'there is one', 'warning')


def require_dumpable(file: OpenFile, found: Sequence[Finding]) -> None:
    """Raise Refused if there is a refusal among the findings: the tree is at rest, but its connections may have
    ended."""
    for one in found:
        if one.severity == 'refusal':
            raise Refused(one.reason, errno=getattr(errno, one.errno), task=file.pid, resource=f'fd {file.fd}',
                          hint=one.hint)


# ---------------------------------------------------------------- restart

def rights(lookup: FileLookup) -> AbstractContextManager[object]:
    """Return the block in which sockets are made: with the user's rights, or root's for root's own image."""
    return nullcontext() if lookup.by_root else lookup.as_user()


def make_socket(record: InetSocket, link: str) -> socket.socket:
    """Make a socket with its options, and without an address. OSError, CkptError."""
    if record.family not in (socket.AF_INET, socket.AF_INET6) or max(record.type, record.protocol) > 1 << 16:
        raise ImageDamaged(f'{link} is an internet socket of family {record.family}, type {record.type} and protocol '
                           f'{record.protocol}')
    sock = socket.socket(record.family, record.type, record.protocol)
    try:
        set_inet_options(sock, record.options, link)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_socket(sock: socket.socket, record: InetSocket, link: str) -> None:
    """Bind a socket to its address. A TCP socket shares its port with its connections meanwhile, see `settle`.
    CkptError."""
    for saved in record.bound:
        address = given_address(saved, record.family)
        if record.type == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(sockaddr(record.family, address))
        except OSError as error:
            reason, hint = not_bound(sock, address, error)
            raise CkptError(f'{link}: {reason}', errno=error.errno or errno.EIO, resource=link, hint=hint) from error


def connect_socket(sock: socket.socket, record: InetSocket, peer: Sequence[InetAddress]) -> None:
    """Give a datagram socket its peer. peer: none, or one. CkptError."""
    for saved in peer:
        address = given_address(saved, record.family)
        try:
            sock.connect(sockaddr(record.family, address))
        except OSError as error:
            raise CkptError(f'a socket cannot be connected to {address}: {error.strerror}', errno=error.errno,
                            resource=str(address), hint='restore it where that address can be reached') from error


def join_groups(sock: socket.socket, record: InetSocket, link: str) -> None:
    """Join the multicast groups. CkptError."""
    for one in record.groups:
        try:
            group = multicast.Group(one.family, socket.if_nametoindex(one.interface), one.address)
            multicast.join(sock, multicast.Membership(group, one.include, one.sources))
        except (OSError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) and error.errno else errno.EBADMSG
            raise CkptError(f'{link}: cannot join the group {one.address} on {one.interface}: {error}', errno=number,
                            resource=link, hint='restore it where that interface exists') from error


def make_datagram_socket(record: InetSocket, peer: Sequence[InetAddress], saved: SavedFile, ctx: RestoreContext
                         ) -> socket.socket:
    """Make a socket with its address, groups, peer and owner. OSError, CkptError."""
    with rights(ctx):
        sock = make_socket(record, saved.link)
        try:
            bind_socket(sock, record, saved.link)
            join_groups(sock, record, saved.link)
            connect_socket(sock, record, peer)
            settle(sock, record, saved.link)
            set_owner(sock.fileno(), saved.mode, record.uid, record.gid, ctx)
        except BaseException:
            sock.close()
            raise
        return sock


def datagram_findings(record: InetSocket, peer: Sequence[InetAddress], saved: SavedFile, lookup: FileLookup
                      ) -> list[Finding]:
    """List the reasons why a restart cannot make such a socket."""
    return [*socket_findings(saved.link, record.uid, record.gid, lookup),
            *probe(record, saved, lookup, lambda sock: connect_socket(sock, record, peer))]


def settle(sock: socket.socket, record: InetSocket, link: str) -> None:
    """Set the options that binding has changed, last of all."""
    settle_options(sock, record.options, link)


def not_bound(sock: socket.socket, address: Address, error: OSError) -> tuple[str, str]:
    """Return the reason why an address cannot be bound, and a hint."""
    if error.errno == errno.EADDRINUSE:
        return f'{address} is in use by {_user_of(sock, address)}', _OWN
    if error.errno == errno.EADDRNOTAVAIL:
        return f'{address} is not an address of this machine', 'restore it where it is, or add it (ip address add)'
    if isinstance(error, PermissionError):
        return f'{address} may not be bound by this user', 'restore it as root'
    return f'{address} cannot be bound: {error.strerror}', 'see ip(7)'


def _user_of(sock: socket.socket, address: Address) -> str:
    """Describe what uses an address: 'nginx[123]', 'a connection in time-wait that no process has any more'."""
    protocol = socket.IPPROTO_TCP if sock.type == socket.SOCK_STREAM else sock.proto
    found = []
    with suppress(OSError):
        found = [one for one in inet_sockets(protocol) if one.local.port == address.port and
                 (one.local.plain == address.plain or {one.local.host, address.host} & {'0.0.0.0', '::'})]
    holders = unix.find_holders({one.inode for one in found if one.inode})
    for holder in holders.values():
        return f'{holder.comm}[{holder.pid}]'
    for one in found:
        if not one.inode:       # it waits for its peer
            return f'a connection in {STATES.get(one.state, "an unknown state")} that no process has any more'
    return 'another process'


def probe(record: InetSocket, saved: SavedFile, lookup: FileLookup,
          also: Callable[[socket.socket], None] | None = None) -> list[Finding]:
    """Make the socket for a moment and list what fails. also: further calls that may fail, with CkptError."""
    try:
        with rights(lookup), make_socket(record, saved.link) as sock:
            bind_socket(sock, record, saved.link)
            join_groups(sock, record, saved.link)
            if also:
                also(sock)
    except CkptError as error:
        return [finding(errno_name(error.errno), error.message, error.hint)]
    except OSError as error:
        hint = 'restore it as root' if isinstance(error, PermissionError) else 'restore it where the kernel has them'
        return [finding(errno_name(error.errno or errno.EIO), f'{saved.link}: sockets of family {record.family}, type '
                        f'{record.type} and protocol {record.protocol} cannot be made: {error.strerror}', hint)]
    return []


def shut_down(fd: int, how: int) -> None:
    """Shut down the directions that were. how: RCV_SHUTDOWN and SEND_SHUTDOWN."""
    if how:
        # ENOTCONN comes from a socket without a peer, after the kernel has done it (net/ipv4/af_inet.c, inet_shutdown)
        with socket.socket(fileno=os.dup(fd)) as sock, suppress(OSError):
            sock.shutdown((how & (unix.RCV_SHUTDOWN | unix.SEND_SHUTDOWN)) - 1)

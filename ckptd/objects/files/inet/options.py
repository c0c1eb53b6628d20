# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of internet sockets: a table for each level. Each is read, compared with that of a fresh socket, and written.

Some cannot be read, so they are lost: IP_MULTICAST_IF given as an interface number, IPV6_JOIN_ANYCAST, IPV6_PKTINFO,
IPV6_MTU, IPV6_ROUTER_ALERT, IP_XFRM_POLICY, TCP_MD5SIG. Others change with the traffic and are the kernel's: TCP_INFO,
TCP_QUICKACK, IP_MTU.
"""

import errno
import socket
from collections.abc import Iterator, Mapping
from functools import lru_cache
from socket import IPPROTO_ICMPV6, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_UDPLITE, SOL_SOCKET

from ckptd.errors import CkptError
from ckptd.image.grammar import U32, Struct, layout
from ckptd.kernel import inet
from ckptd.kernel.sockopt import SO_BINDTOIFINDEX, SO_INCOMING_CPU, read_option
from ckptd.objects.files.options import SocketOption, read_options, set_options

_INT, _BYTES = 4, 2048          # a size; the longest value of an option without a fixed one

# Level: option: bytes of its value
_IP = {
    socket.IP_TOS: _INT, socket.IP_TTL: _INT, socket.IP_HDRINCL: _INT, socket.IP_OPTIONS: _BYTES,
    inet.IP_ROUTER_ALERT: _INT, socket.IP_RECVOPTS: _INT, socket.IP_RETOPTS: _INT, inet.IP_PKTINFO: _INT,
    inet.IP_MTU_DISCOVER: _INT, inet.IP_RECVERR: _INT, inet.IP_RECVTTL: _INT, socket.IP_RECVTOS: _INT,
    inet.IP_FREEBIND: _INT, inet.IP_PASSSEC: _INT, socket.IP_TRANSPARENT: _INT, inet.IP_RECVORIGDSTADDR: _INT,
    inet.IP_MINTTL: _INT, inet.IP_NODEFRAG: _INT, inet.IP_CHECKSUM: _INT, socket.IP_BIND_ADDRESS_NO_PORT: _INT,
    inet.IP_RECVFRAGSIZE: _INT, inet.IP_RECVERR_RFC4884: _INT, socket.IP_MULTICAST_IF: _INT,
    socket.IP_MULTICAST_TTL: _INT, socket.IP_MULTICAST_LOOP: _INT, inet.IP_MULTICAST_ALL: _INT,
    inet.IP_UNICAST_IF: _INT, inet.IP_LOCAL_PORT_RANGE: _INT,
}
_IPV6 = {
    inet.IPV6_2292PKTINFO: _INT, inet.IPV6_2292HOPOPTS: _INT, inet.IPV6_2292DSTOPTS: _INT, inet.IPV6_2292RTHDR: _INT,
    inet.IPV6_2292HOPLIMIT: _INT, socket.IPV6_CHECKSUM: _INT, inet.IPV6_FLOWINFO: _INT, socket.IPV6_UNICAST_HOPS: _INT,
    socket.IPV6_MULTICAST_IF: _INT, socket.IPV6_MULTICAST_HOPS: _INT, socket.IPV6_MULTICAST_LOOP: _INT,
    inet.IPV6_MTU_DISCOVER: _INT, inet.IPV6_RECVERR: _INT, socket.IPV6_V6ONLY: _INT, inet.IPV6_MULTICAST_ALL: _INT,
    inet.IPV6_ROUTER_ALERT_ISOLATE: _INT, inet.IPV6_RECVERR_RFC4884: _INT, inet.IPV6_FLOWINFO_SEND: _INT,
    inet.IPV6_HDRINCL: _INT, socket.IPV6_RECVPKTINFO: _INT, socket.IPV6_RECVHOPLIMIT: _INT,
    socket.IPV6_RECVHOPOPTS: _INT, socket.IPV6_HOPOPTS: _BYTES, socket.IPV6_RTHDRDSTOPTS: _BYTES,
    socket.IPV6_RECVRTHDR: _INT, socket.IPV6_RTHDR: _BYTES, socket.IPV6_RECVDSTOPTS: _INT, socket.IPV6_DSTOPTS: _BYTES,
    socket.IPV6_RECVPATHMTU: _INT, socket.IPV6_DONTFRAG: _INT, socket.IPV6_RECVTCLASS: _INT, socket.IPV6_TCLASS: _INT,
    inet.IPV6_AUTOFLOWLABEL: _INT, inet.IPV6_ADDR_PREFERENCES: _INT, inet.IPV6_MINHOPCOUNT: _INT,
    inet.IPV6_RECVORIGDSTADDR: _INT, inet.IPV6_TRANSPARENT: _INT, inet.IPV6_UNICAST_IF: _INT,
    inet.IPV6_RECVFRAGSIZE: _INT, inet.IPV6_FREEBIND: _INT,
}
_TCP = {
    socket.TCP_CONGESTION: 16, socket.TCP_NODELAY: _INT, socket.TCP_MAXSEG: _INT, socket.TCP_CORK: _INT,
    socket.TCP_KEEPIDLE: _INT, socket.TCP_KEEPINTVL: _INT, socket.TCP_KEEPCNT: _INT, socket.TCP_SYNCNT: _INT,
    socket.TCP_LINGER2: _INT, socket.TCP_DEFER_ACCEPT: _INT, socket.TCP_WINDOW_CLAMP: _INT,
    inet.TCP_THIN_LINEAR_TIMEOUTS: _INT, socket.TCP_USER_TIMEOUT: _INT, socket.TCP_FASTOPEN: _INT,
    socket.TCP_NOTSENT_LOWAT: _INT, inet.TCP_SAVE_SYN: _INT, inet.TCP_FASTOPEN_CONNECT: _INT,
    inet.TCP_FASTOPEN_KEY: 32, inet.TCP_FASTOPEN_NO_COOKIE: _INT, inet.TCP_INQ: _INT, inet.TCP_TX_DELAY: _INT,
    inet.TCP_RTO_MAX_MS: _INT,
}
_UDP = {inet.UDP_CORK: _INT, inet.UDP_ENCAP: _INT, inet.UDP_NO_CHECK6_TX: _INT, inet.UDP_NO_CHECK6_RX: _INT,
        inet.UDP_SEGMENT: _INT, inet.UDP_GRO: _INT}
TABLE: Mapping[int, Mapping[int, int]] = {
    IPPROTO_IP: _IP, IPPROTO_IPV6: _IPV6, IPPROTO_TCP: _TCP, IPPROTO_UDP: _UDP,
    IPPROTO_UDPLITE: {socket.UDPLITE_SEND_CSCOV: _INT, socket.UDPLITE_RECV_CSCOV: _INT},
    inet.SOL_RAW: {inet.ICMP_FILTER: _INT}, IPPROTO_ICMPV6: {inet.ICMPV6_FILTER: 32},
}
# of a connection they are the kernel's: getsockopt(2) returns what the two ends have agreed on
_OF_UNCONNECTED = {(IPPROTO_TCP, name) for name in (
    socket.TCP_MAXSEG, socket.TCP_WINDOW_CLAMP, socket.TCP_FASTOPEN, inet.TCP_FASTOPEN_CONNECT, inet.TCP_FASTOPEN_KEY,
)} | {(IPPROTO_IPV6, socket.IPV6_V6ONLY)}
# of a TCP socket they mean nothing and cannot be set; an accepted one has there what came with its first packet
_OF_DATAGRAMS = {(IPPROTO_IP, name) for name in (socket.IP_MULTICAST_IF, socket.IP_MULTICAST_TTL)} | {
    (IPPROTO_IPV6, name) for name in (socket.IPV6_MULTICAST_IF, socket.IPV6_MULTICAST_HOPS)}
_NOT_HERE = (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTCONN, errno.EADDRNOTAVAIL)
# another interface may have the number after a boot, so the name is kept; the CPU is that of the last packet
_NOT_KEPT = (SO_BINDTOIFINDEX, SO_INCOMING_CPU)
_IFNAMSIZ = 16

Name = tuple[int, int]      # level, option


@layout
class LevelOption(Struct):
    """A socket option. value: as getsockopt(2) returns it."""
    level: U32
    name: U32
    value: bytes


@layout
class InetOptions(Struct):
    """The options that differ from those of a fresh socket of the same family, type and protocol."""
    device: str                         # SO_BINDTODEVICE
    plain: tuple[SocketOption, ...]     # SOL_SOCKET
    levels: tuple[LevelOption, ...]


def dump_inet_options(sock: socket.socket, plain: tuple[SocketOption, ...], *, is_connected: bool) -> InetOptions:
    """Return the options. plain: those of SOL_SOCKET."""
    fresh = _fresh(sock.family, sock.type, sock.proto)
    levels = tuple(LevelOption(*name, value) for name, value in _read_all(sock, is_connected=is_connected).items()
                   if fresh.get(name) != value)
    device = sock.getsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, _IFNAMSIZ).rstrip(b'\0').decode('utf-8', 'replace')
    return InetOptions(device, tuple(one for one in plain if one.name not in _NOT_KEPT), levels)


def set_inet_options(sock: socket.socket, options: InetOptions, link: str) -> None:
    """Set the options of a socket that has no address yet. CkptError for a value that may not be set here."""
    if options.device:
        _set(sock, SOL_SOCKET, socket.SO_BINDTODEVICE, options.device.encode() + b'\0', link)
    for option in options.levels:
        if option.level not in TABLE or option.name not in TABLE[option.level]:
            raise CkptError(f'{link}: option {option.name} of level {option.level} is not one that a checkpoint keeps',
                            errno=errno.EBADMSG, resource=link)
        _set(sock, option.level, option.name, option.value, link)
    set_options(sock, options.plain, link)      # later, because IP_TOS sets SO_PRIORITY as well


def settle_options(sock: socket.socket, options: InetOptions, link: str) -> None:
    """Compare the options with those of the image, and set again what another call has changed."""
    wanted = {(option.level, option.name): option.value for option in options.levels}
    wanted |= {(SOL_SOCKET, option.name): option.value for option in options.plain}
    now = _read_all(sock, is_connected=False)
    now |= {(SOL_SOCKET, name): value for name, value in read_options(sock).items()}
    for (level, name), value in now.items():
        right = wanted.get((level, name), _usual(sock, level, name))
        if right not in (None, value) and name not in _NOT_KEPT:
            _set(sock, level, name, right, link)


def _usual(sock: socket.socket, level: int, name: int) -> bytes | None:
    """Return the value that a fresh socket has for an option that other calls change."""
    others = (socket.SO_REUSEADDR, socket.SO_PRIORITY) if sock.type == socket.SOCK_STREAM else (socket.SO_PRIORITY,)
    return bytes(_INT) if level == SOL_SOCKET and name in others else None


def _set(sock: socket.socket, level: int, name: int, value: bytes, link: str) -> None:
    try:
        sock.setsockopt(level, name, value)
    except OSError as error:
        hint = 'restore it as root' if isinstance(error, PermissionError) else 'restore it where the kernel has it'
        raise CkptError(f'{link}: socket option {name} of level {level} cannot be set again: {error.strerror}',
                        errno=error.errno, resource=link, hint=hint) from error


def _levels(sock: socket.socket) -> Iterator[int]:
    yield IPPROTO_IP
    if sock.family == socket.AF_INET6:
        yield IPPROTO_IPV6
    if sock.type == socket.SOCK_STREAM:
        yield IPPROTO_TCP
    elif sock.type == socket.SOCK_RAW:
        yield from (inet.SOL_RAW, IPPROTO_ICMPV6)
    elif sock.proto in (IPPROTO_UDP, IPPROTO_UDPLITE):
        yield from (IPPROTO_UDP, IPPROTO_UDPLITE)


def _read_all(sock: socket.socket, *, is_connected: bool) -> dict[Name, bytes]:
    found = {}
    for level in _levels(sock):
        for name, size in TABLE[level].items():
            if is_connected and (level, name) in _OF_UNCONNECTED:
                continue
            if sock.type == socket.SOCK_STREAM and (level, name) in _OF_DATAGRAMS:
                continue
            try:
                found[level, name] = read_option(sock, name, size, level)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise       # otherwise this kernel, or this sort of socket, has no such option
    return found


@lru_cache(maxsize=16)
def _fresh(family: int, kind: int, protocol: int) -> Mapping[Name, bytes]:
    try:
        with socket.socket(family, kind, protocol) as sock:
            return _read_all(sock, is_connected=False)
    except PermissionError:     # of a kind that only root may make
        return {}

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Internet sockets (ip(7), ipv6(7), tcp(7), udp(7), raw(7)): options that the module socket lacks, addresses,
states."""

import errno
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final, NamedTuple

from ckptd.kernel.procfs import read_file
from ckptd.kernel.sockopt import SO_NETNS_COOKIE, read_option

# <linux/in.h>
IP_ROUTER_ALERT: Final = 5
IP_PKTINFO: Final = 8
IP_MTU_DISCOVER, IP_RECVERR, IP_RECVTTL = 10, 11, 12
IP_FREEBIND, IP_PASSSEC = 15, 18
IP_RECVORIGDSTADDR: Final = 20
IP_MINTTL, IP_NODEFRAG, IP_CHECKSUM = 21, 22, 23
IP_RECVFRAGSIZE, IP_RECVERR_RFC4884 = 25, 26
IP_MSFILTER, MCAST_MSFILTER = 41, 48
IP_MULTICAST_ALL, IP_UNICAST_IF = 49, 50
IP_LOCAL_PORT_RANGE: Final = 51                     # since 6.3
# <linux/in6.h>
IPV6_2292PKTINFO, IPV6_2292HOPOPTS, IPV6_2292DSTOPTS, IPV6_2292RTHDR, IPV6_2292HOPLIMIT = 2, 3, 4, 5, 8
IPV6_FLOWINFO: Final = 11
IPV6_MTU_DISCOVER, IPV6_RECVERR = 23, 25
IPV6_MULTICAST_ALL, IPV6_ROUTER_ALERT_ISOLATE, IPV6_RECVERR_RFC4884 = 29, 30, 31
IPV6_FLOWINFO_SEND, IPV6_HDRINCL = 33, 36
IPV6_AUTOFLOWLABEL, IPV6_ADDR_PREFERENCES, IPV6_MINHOPCOUNT = 70, 72, 73
IPV6_RECVORIGDSTADDR, IPV6_TRANSPARENT, IPV6_UNICAST_IF = 74, 75, 76
IPV6_RECVFRAGSIZE, IPV6_FREEBIND = 77, 78
# <linux/tcp.h>
TCP_THIN_LINEAR_TIMEOUTS: Final = 16
TCP_SAVE_SYN, TCP_FASTOPEN_CONNECT, TCP_ULP = 27, 30, 31
TCP_FASTOPEN_KEY, TCP_FASTOPEN_NO_COOKIE = 33, 34
TCP_INQ, TCP_TX_DELAY = 36, 37
TCP_AO_INFO: Final = 40                             # since 6.7
TCP_RTO_MAX_MS: Final = 44                          # since 6.15
# <linux/udp.h>
UDP_CORK, UDP_ENCAP, UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX, UDP_SEGMENT, UDP_GRO = 1, 100, 101, 102, 103, 104
# <linux/icmp.h>, <linux/icmpv6.h>, <net/sock.h>
ICMP_FILTER, ICMPV6_FILTER, SOL_RAW = 1, 1, 255

# <net/tcp_states.h>
TCP_ESTABLISHED, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_TIME_WAIT = 1, 2, 3, 4, 5, 6
TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING = 7, 8, 9, 10, 11
STATES: Final = {
    TCP_ESTABLISHED: 'established', TCP_SYN_SENT: 'connecting', TCP_SYN_RECV: 'connecting',
    TCP_FIN_WAIT1: 'fin-wait-1', TCP_FIN_WAIT2: 'fin-wait-2', TCP_TIME_WAIT: 'time-wait', TCP_CLOSE: 'closed',
    TCP_CLOSE_WAIT: 'close-wait', TCP_LAST_ACK: 'last-ack', TCP_LISTEN: 'listening', TCP_CLOSING: 'closing'}
# an end that has sent its FIN, or received that of its peer
HAVE_SENT_FIN = (TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSING, TCP_LAST_ACK)
HAVE_RECEIVED_FIN = (TCP_CLOSE_WAIT, TCP_CLOSING, TCP_LAST_ACK)

_UNACKED_AT, _LAST_ACK_AT = 24, 56      # offsets in struct tcp_info, <linux/tcp.h>
_INFO = struct.Struct(f'=B{_UNACKED_AT - 1}xII')
_AO_INFO = 48                           # sizeof(struct tcp_ao_info_opt)


class Address(NamedTuple):
    """An address of AF_INET or AF_INET6. host: as inet_ntop(3) writes it. flow: in network byte order."""
    host: str
    port: int
    flow: int = 0
    scope: int = 0

    def __str__(self) -> str:
        return f'[{self.host}]:{self.port}' if ':' in self.host else f'{self.host}:{self.port}'

    @property
    def is_any(self) -> bool:
        """Whether it is the address and port of a socket that is not bound."""
        return self.host in ('0.0.0.0', '::') and not self.port

    @property
    def plain(self) -> str:
        """The host, of an IPv4 address in its IPv4 form: 192.0.2.1 for ::ffff:192.0.2.1."""
        return self.host.removeprefix('::ffff:') if '.' in self.host else self.host

    def in_family(self, family: int) -> 'Address':
        """Return it as a socket of a family takes it: ::ffff:192.0.2.1 for 192.0.2.1 and AF_INET6."""
        plain = self.plain
        return self._replace(host=f'::ffff:{plain}' if family == socket.AF_INET6 and ':' not in plain else plain)


class TcpState(NamedTuple):
    """The first fields of struct tcp_info, <linux/tcp.h>."""
    state: int
    waiting: int        # of a listener: connections that wait to be accepted
    backlog: int        # of a listener: the argument of listen(2)


def tcp_state(sock: socket.socket) -> TcpState:
    """Return the state of a TCP or MPTCP socket. OSError."""
    info = read_option(sock, socket.TCP_INFO, _INFO.size, socket.IPPROTO_TCP)
    return TcpState(*_INFO.unpack(info))


def has_ao_keys(sock: socket.socket) -> bool:
    """Whether a TCP socket has keys of TCP-AO (RFC 5925), which sign its packets. OSError."""
    try:
        read_option(sock, TCP_AO_INFO, _AO_INFO, socket.IPPROTO_TCP)
    except OSError as error:
        # it has none; the kernel has no TCP-AO; MPTCP has none
        if error.errno in (errno.ENOENT, errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            return False
        raise
    return True


def last_packet(sock: socket.socket) -> int:
    """Return the time of the last packet that acknowledged something, milliseconds of CLOCK_MONOTONIC."""
    info = read_option(sock, socket.TCP_INFO, _LAST_ACK_AT + 4, socket.IPPROTO_TCP)
    return time.monotonic_ns() // 1_000_000 - int.from_bytes(info[_LAST_ACK_AT:], 'little')


def local_address(sock: socket.socket) -> Address:
    """Return getsockname(2)."""
    return address_of(sock.getsockname())


def peer_address(sock: socket.socket) -> Address | None:
    """Return getpeername(2); None without a peer."""
    with suppress(OSError):
        return address_of(sock.getpeername())
    return None


def raw_peers() -> dict[int, Address]:
    """Return the peers of all connected raw sockets of our network namespace, by inode. getpeername(2) does not: they
    have no port."""
    found: dict[int, Address] = {}
    for name in ('raw', 'raw6'):
        with suppress(FileNotFoundError):       # a kernel without IPv6
            found.update(parse_raw(read_file(f'/proc/self/net/{name}').decode()))
    return found


def parse_raw(text: str) -> Iterator[tuple[int, Address]]:
    """Parse /proc/net/raw and raw6: '223: 0100007F:00FD 0200007F:0000 01 ... 257347 ...'. Addresses are hexadecimal
    numbers of 32 bits in the byte order of the machine."""
    for line in text.splitlines()[1:]:
        fields = line.split()
        packed = bytes.fromhex(fields[2].partition(':')[0])
        address = b''.join(packed[at:at + 4][::-1] for at in range(0, len(packed), 4))
        if int(fields[3], 16) == TCP_ESTABLISHED:
            host = socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
            yield int(fields[9]), Address(host, 0)


def address_of(name: tuple[Any, ...]) -> Address:
    """Return an address of the module socket: (host, port) or (host, port, flow, scope)."""
    host, port, *rest = name
    return Address(host.partition('%')[0], port, *rest)     # getnameinfo(3) adds the interface to a link-local address


def sockaddr(family: int, address: Address) -> tuple[str, int] | tuple[str, int, int, int]:
    """Return the argument of bind and connect."""
    return (address.host, address.port) if family == socket.AF_INET else (*address,)


def netns_cookie(sock: socket.socket) -> int:
    """Return the number of the socket's network namespace, which is not used again within a boot; 0 before Linux
    5.14."""
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), 'little')
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return 0

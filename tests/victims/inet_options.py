# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of internet sockets: each on a socket of its own, with a value that no fresh socket has."""

import os
import socket
import struct

from victim import ready, wait_for_go

V4, V6, STREAM, DGRAM, RAW = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
SOL, IP, IPV6, TCP, UDP = socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.IPPROTO_TCP, \
    socket.IPPROTO_UDP
UDPLITE, SOL_RAW, ICMPV6, EXPERIMENT = 136, 255, 58, 253
LO = socket.if_nametoindex('lo')
NOPS = b'\x01\x01\x01\x01'                          # IPOPT_NOOP
PADDING = b'\x3b\x00\x01\x04\x00\x00\x00\x00'       # an extension header with a PadN option

Value = int | bytes
# (family, type, protocol, level, {option: value}); numbers that the module socket lacks are those of <linux/in.h> ...
ALL: list[tuple[int, int, int, int, dict[int, Value]]] = [
    (V4, STREAM, 0, TCP, {
        socket.TCP_NODELAY: 1, socket.TCP_CORK: 1, socket.TCP_KEEPIDLE: 77, socket.TCP_KEEPINTVL: 7,
        socket.TCP_KEEPCNT: 3, socket.TCP_SYNCNT: 2, socket.TCP_USER_TIMEOUT: 9000, 27: 1, socket.TCP_MAXSEG: 600,
        socket.TCP_LINGER2: 20, socket.TCP_DEFER_ACCEPT: 7, socket.TCP_WINDOW_CLAMP: 30_000,
        socket.TCP_NOTSENT_LOWAT: 5000, 16: 1, socket.TCP_FASTOPEN: 5, 30: 1, 34: 1, 36: 1, 37: 1000, 44: 20_000,
        33: bytes(range(16)), socket.TCP_CONGESTION: b'reno'}),
    (V6, STREAM, 0, TCP, {socket.TCP_NODELAY: 1, socket.TCP_MAXSEG: 700}),
    (V4, DGRAM, 0, IP, {
        socket.IP_TOS: 16, socket.IP_TTL: 9, socket.IP_OPTIONS: NOPS, socket.IP_RECVOPTS: 1, socket.IP_RETOPTS: 1,
        8: 1, 10: 2, 11: 1, 12: 1, socket.IP_RECVTOS: 1, 15: 1, 18: 1, 20: 1, 21: 5, 23: 1,
        socket.IP_BIND_ADDRESS_NO_PORT: 1, 25: 1, 26: 1, socket.IP_MULTICAST_IF: socket.inet_aton('127.0.0.1'),
        socket.IP_MULTICAST_TTL: 4, socket.IP_MULTICAST_LOOP: 0, 49: 0, 50: struct.pack('>I', LO),
        51: struct.pack('=HH', 40_000, 41_000)}),
    (V6, DGRAM, 0, IPV6, {
        2: 1, 3: 1, 4: 1, 5: 1, 8: 1, 11: 1, socket.IPV6_UNICAST_HOPS: 12, socket.IPV6_MULTICAST_IF: LO,
        socket.IPV6_MULTICAST_HOPS: 3, socket.IPV6_MULTICAST_LOOP: 0, 23: 2, 25: 1, socket.IPV6_V6ONLY: 1, 29: 0, 30: 1,
        31: 1, 33: 1, socket.IPV6_RECVPKTINFO: 1, socket.IPV6_RECVHOPLIMIT: 1, socket.IPV6_RECVHOPOPTS: 1,
        socket.IPV6_RECVRTHDR: 1, socket.IPV6_RECVDSTOPTS: 1, socket.IPV6_RECVPATHMTU: 1, socket.IPV6_DONTFRAG: 1,
        socket.IPV6_RECVTCLASS: 1, socket.IPV6_TCLASS: 8, 70: 0, 72: 1, 73: 7, 74: 1, 76: struct.pack('>I', LO), 77: 1,
        78: 1}),
    (V6, DGRAM, 0, IP, {socket.IP_TTL: 11, 12: 1}),
    (V4, DGRAM, 0, UDP, {1: 1, 101: 1, 102: 1, 103: 1200, 104: 1}),
    (V4, DGRAM, UDPLITE, UDPLITE, {10: 16, 11: 16}),
    (V4, STREAM, 0, SOL, {socket.SO_KEEPALIVE: 1, socket.SO_OOBINLINE: 1, socket.SO_REUSEADDR: 1,
                          socket.SO_REUSEPORT: 1, socket.SO_LINGER: struct.pack('ii', 1, 9), socket.SO_RCVLOWAT: 5,
                          socket.SO_DONTROUTE: 1, socket.SO_SNDBUF: 30_000, socket.SO_RCVBUF: 40_000, 60: 1}),
    (V4, DGRAM, 0, SOL, {socket.SO_BROADCAST: 1, socket.SO_PRIORITY: 5, 11: 1, 29: 1, 37: 0x58, 40: 1,
                         socket.SO_BINDTODEVICE: b'lo\0', 61: struct.pack('iI', 1, 0)}),
]
AS_ROOT: list[tuple[int, int, int, int, dict[int, Value]]] = [
    (V4, DGRAM, 0, SOL, {socket.SO_MARK: 77, 75: 1}),
    (V4, DGRAM, 0, IP, {socket.IP_TRANSPARENT: 1}),
    (V6, DGRAM, 0, IPV6, {75: 1, socket.IPV6_HOPOPTS: PADDING, socket.IPV6_DSTOPTS: PADDING,
                          socket.IPV6_RTHDRDSTOPTS: PADDING}),
    (V4, RAW, EXPERIMENT, IP, {socket.IP_HDRINCL: 1, 22: 1, 5: 1}),
    (V4, RAW, socket.IPPROTO_ICMP, SOL_RAW, {1: 0x100}),
    (V6, RAW, EXPERIMENT, IPV6, {socket.IPV6_CHECKSUM: 2, 36: 1}),
    (V6, RAW, ICMPV6, ICMPV6, {1: b'\xff' * 32}),
    (V4, DGRAM, 0, UDP, {100: 2}),
]


def read(sock: socket.socket, level: int, name: int, like: Value) -> Value:
    """Values of bytes have a length of their own."""
    return sock.getsockopt(level, name, 64) if isinstance(like, bytes) else sock.getsockopt(level, name)


def main() -> None:
    made = []
    for family, kind, protocol, level, options in ALL + (AS_ROOT if os.geteuid() == 0 else []):
        for name, value in options.items():
            with socket.socket(family, kind, protocol) as fresh:
                try:
                    usual = read(fresh, level, name, value)
                except OSError:
                    continue        # this kernel does not have it
            one = socket.socket(family, kind, protocol)
            one.setsockopt(level, name, value)
            now = read(one, level, name, value)
            assert now != usual, (level, name)
            made.append((one, level, name, value, now))
    # what another option sets as well
    both = socket.socket(V4, DGRAM)
    both.setsockopt(IP, socket.IP_TOS, 16)
    both.setsockopt(SOL, socket.SO_PRIORITY, 0)
    # buffers beyond net.core.wmem_max and rmem_max, which root may have
    large = socket.socket(V4, DGRAM)
    if os.geteuid() == 0:
        large.setsockopt(SOL, 32, 8 << 20)      # SO_SNDBUFFORCE
        large.setsockopt(SOL, 33, 9 << 20)      # SO_RCVBUFFORCE
    sizes = [large.getsockopt(SOL, name) for name in (socket.SO_SNDBUF, socket.SO_RCVBUF)]
    ready()
    wait_for_go()
    assert [large.getsockopt(SOL, name) for name in (socket.SO_SNDBUF, socket.SO_RCVBUF)] == sizes
    for one, level, name, value, now in made:
        assert read(one, level, name, value) == now, (level, name)
    assert both.getsockopt(IP, socket.IP_TOS) == 16
    assert both.getsockopt(SOL, socket.SO_PRIORITY) == 0


main()

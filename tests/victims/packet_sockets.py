# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packet sockets on the loopback interface: bound, unbound, with options, memberships, a filter and a fanout group.
Only root can make them; the victim of a user has none."""

import ctypes
import os
import socket
import struct

from victim import ready, wait_for_go

PACKET, RAW, DGRAM, OLD = socket.AF_PACKET, socket.SOCK_RAW, socket.SOCK_DGRAM, 10      # SOCK_PACKET
SOL_PACKET, FANOUT, ADD_MEMBERSHIP, COPY_THRESH = 263, 18, 1, 7
# <linux/if_packet.h>: version, reserve, origdev, auxdata, time stamps of the device, loss, tx-has-off, qdisc bypass,
# ignore-outgoing
OPTIONS = {10: 1, 12: 16, 9: 1, 8: 1, 17: 0x58, 14: 1, 19: 1, 20: 1, 23: 1}
VNET_HDR, VNET_HDR_SZ = 15, 24
# protocols that no other process uses, not even another one of this program
ONE, TWO, THREE = (0xa000 + os.getpid() * 3 % 0x3000 + number for number in range(3))
MR_MULTICAST, MR_PROMISC = 0, 1
LO = socket.if_nametoindex('lo')
# accept all packets, 60 bytes at most: BPF_RET
ACCEPT = struct.pack('=HBBI', 6, 0, 0, 60)


def made(kind: int, protocol: int = 0, interface: str = '') -> socket.socket:
    one = socket.socket(PACKET, kind, 0 if interface else socket.htons(protocol))
    if interface:
        one.bind((interface, protocol))
    one.settimeout(10)
    return one


def old(protocol: int) -> socket.socket:
    """A socket of the obsolete type, which is bound by a struct sockaddr."""
    one = socket.socket(PACKET, OLD, socket.htons(protocol))
    address = struct.pack('=H14s', PACKET, b'lo')
    assert ctypes.CDLL(None).bind(one.fileno(), address, len(address)) == 0
    one.settimeout(10)
    return one


def value_of(sock: socket.socket, name: int) -> bytes:
    try:
        return sock.getsockopt(SOL_PACKET, name, 64)
    except OSError:     # an older kernel, or SOCK_PACKET
        return b''


class Sockets:

    def __init__(self) -> None:
        self.fresh, self.sender = made(RAW), made(RAW)
        self.raw, self.plain, self.everywhere = (made(kind, protocol, name) for kind, protocol, name in (
            (RAW, ONE, 'lo'), (DGRAM, ONE, 'lo'), (DGRAM, TWO, '')))
        self.old = old(ONE)
        self.group = [made(RAW, THREE, 'lo') for _ in range(2)]
        self.group[0].setsockopt(SOL_PACKET, FANOUT, 1 << 16 | 0x2000 << 16)       # PACKET_FANOUT_LB, a free id
        group_id = self.group[0].getsockopt(SOL_PACKET, FANOUT) & 0xffff
        self.group[1].setsockopt(SOL_PACKET, FANOUT, group_id | 1 << 16)
        self.optional = made(RAW)
        for name, value in OPTIONS.items():
            before = value_of(self.optional, name)
            if before:
                self.optional.setsockopt(SOL_PACKET, name, value)
                assert value_of(self.optional, name) != before, name
        self.optional.setsockopt(SOL_PACKET, COPY_THRESH, 1000)
        self.optional.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 3)
        self.optional.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        self.header = made(RAW)
        self.header.setsockopt(SOL_PACKET, VNET_HDR, 1)
        code = ctypes.create_string_buffer(ACCEPT)
        self.raw.setsockopt(socket.SOL_SOCKET, 26, struct.pack('=HxxxxxxQ', 1, ctypes.addressof(code)))
        self.member = made(RAW)
        for kind, address in ((MR_PROMISC, b''), (MR_PROMISC, b''), (MR_MULTICAST, b'\1\0\x5e\1\2\3')):
            self.member.setsockopt(SOL_PACKET, ADD_MEMBERSHIP, struct.pack('=iHH8s', LO, kind, len(address), address))
        self.before = self.look()

    def every(self) -> list[socket.socket]:
        return [self.fresh, self.sender, self.raw, self.plain, self.everywhere, self.old, *self.group, self.optional,
                self.header, self.member]

    def look(self) -> list[object]:
        return [(one.type, one.getsockname(),
                 [value_of(one, name) for name in (*OPTIONS, VNET_HDR, VNET_HDR_SZ, COPY_THRESH, FANOUT)],
                 [one.getsockopt(socket.SOL_SOCKET, name) for name in (socket.SO_PRIORITY, socket.SO_RCVBUF)])
                for one in self.every()]

    def check(self) -> None:
        now = self.look()
        assert now == self.before, [pair for pair in zip(now, self.before, strict=True) if pair[0] != pair[1]]
        self.sender.bind(('lo', 0))
        self.send(ONE)
        assert len(self.raw.recv(200)) == 60, 'the filter shortens it'
        assert self.plain.recv(200)[:4] == b'data'
        assert self.old.recv(200)[14:18] == b'data'
        self.send(TWO)
        assert self.everywhere.recv(200)[:4] == b'data'
        for _ in range(4):      # each member of the group gets half of them
            self.send(THREE)
        for one in self.group:
            for _ in range(2):
                assert one.recv(200)[14:18] == b'data'
            one.setblocking(False)
            try:
                raise AssertionError(one.recv(200))
            except BlockingIOError:
                pass

    def send(self, protocol: int) -> None:
        self.sender.send(bytes(12) + struct.pack('>H', protocol) + b'data' + bytes(60))


def main() -> None:
    sockets = Sockets() if os.geteuid() == 0 else None
    ready()
    wait_for_go()
    if sockets:
        sockets.check()


main()

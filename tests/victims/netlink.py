# SPDX-License-Identifier: LGPL-2.1-or-later
"""Netlink sockets: bound, with groups beyond the first 32, options, and one that asks the kernel."""

import os
import socket
import struct

from victim import ready, wait_for_go

NETLINK, SOL_NETLINK, ROUTE, RTM_GETLINK, NLM_F_DUMP = socket.AF_NETLINK, 270, 0, 18, 0x301
LIST_MEMBERSHIPS, ADD_MEMBERSHIP, PKTINFO, EXT_ACK = 9, 1, 3, 11


def look(sock: socket.socket) -> tuple[object, ...]:
    return (sock.getsockname(), sock.getpeername(), sock.type, sock.proto,
            sock.getsockopt(SOL_NETLINK, LIST_MEMBERSHIPS, 64), sock.getsockopt(SOL_NETLINK, PKTINFO),
            sock.getsockopt(SOL_NETLINK, EXT_ACK), sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))


def main() -> None:
    fresh, asking, member, connected = (socket.socket(NETLINK, socket.SOCK_RAW, ROUTE) for _ in range(4))
    asking.bind((os.getpid(), 0))
    member.bind((0, 1 << 4))                                        # RTMGRP_IPV4_IFADDR
    member.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, 33)              # RTNLGRP_MPLS_NETCONF or so
    member.setsockopt(SOL_NETLINK, PKTINFO, 1)
    member.setsockopt(SOL_NETLINK, EXT_ACK, 1)
    member.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
    connected.connect((0, 0))
    made = (fresh, asking, member, connected)
    before = [look(one) for one in made]
    ready()
    wait_for_go()
    assert [look(one) for one in made] == before
    asking.send(struct.pack('=IHHII', 32, RTM_GETLINK, NLM_F_DUMP, 5, 0) + bytes(16))
    answer = asking.recv(1 << 16)
    assert struct.unpack_from('=IHHI', answer)[3] == 5


main()

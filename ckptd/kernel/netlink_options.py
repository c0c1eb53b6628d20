# SPDX-License-Identifier: LGPL-2.1-or-later
"""Options of netlink sockets (netlink(7)), and the groups that one has joined."""

import socket
import struct
from typing import Final

from ckptd.kernel.sockopt import read_option

# <linux/netlink.h>
NETLINK_ADD_MEMBERSHIP, NETLINK_LIST_MEMBERSHIPS = 1, 9
NETLINK_PKTINFO, NETLINK_BROADCAST_ERROR, NETLINK_NO_ENOBUFS, NETLINK_LISTEN_ALL_NSID = 3, 4, 5, 8
NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 10, 11, 12
SOL_NETLINK: Final = 270        # <linux/socket.h>

_MOST = 4096                    # bytes: 32768 groups


def memberships(sock: socket.socket) -> tuple[int, ...]:
    """Return the numbers of the groups, from 1 on. OSError."""
    data = read_option(sock, NETLINK_LIST_MEMBERSHIPS, _MOST, SOL_NETLINK)
    words = struct.unpack(f'={len(data) // 4}I', data[:len(data) // 4 * 4])
    return tuple(32 * at + bit + 1 for at, word in enumerate(words) for bit in range(32) if word >> bit & 1)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Address families (socket(2)) and protocols that not every build of the module socket has."""

import os
import socket
from typing import Final

from ckptd.kernel.sockopt import SO_DOMAIN, SO_PROTOCOL

# <bits/socket.h>, the AF_* of include/linux/socket.h
AF_APPLETALK, AF_X25, AF_KEY, AF_ATMPVC, AF_ATMSVC = 5, 9, 15, 8, 20
AF_RDS, AF_PPPOX, AF_LLC, AF_CAN, AF_TIPC, AF_BLUETOOTH = 21, 24, 26, 29, 30, 31
AF_IUCV, AF_RXRPC, AF_ISDN, AF_PHONET, AF_IEEE802154, AF_CAIF = 32, 33, 34, 35, 36, 37
AF_ALG, AF_NFC, AF_VSOCK, AF_KCM, AF_QIPCRTR, AF_SMC, AF_XDP, AF_MCTP = 38, 39, 40, 41, 42, 43, 44, 45

# <linux/in.h>; IPPROTO_SMC since 6.10
IPPROTO_DCCP, IPPROTO_L2TP, IPPROTO_SCTP, IPPROTO_SMC = 33, 115, 132, 256

NAMES: Final = {
    AF_APPLETALK: 'AppleTalk', AF_X25: 'X.25', AF_KEY: 'PF_KEY (IPsec)', AF_ATMPVC: 'ATM', AF_ATMSVC: 'ATM',
    AF_RDS: 'RDS', AF_PPPOX: 'PPPoX', AF_LLC: 'LLC', AF_CAN: 'CAN', AF_TIPC: 'TIPC', AF_BLUETOOTH: 'Bluetooth',
    AF_IUCV: 'IUCV', AF_RXRPC: 'RxRPC', AF_ISDN: 'ISDN', AF_PHONET: 'Phonet', AF_IEEE802154: 'IEEE 802.15.4',
    AF_CAIF: 'CAIF', AF_ALG: 'AF_ALG (kernel crypto)', AF_NFC: 'NFC', AF_VSOCK: 'vsock', AF_KCM: 'KCM',
    AF_QIPCRTR: 'QIPCRTR', AF_SMC: 'SMC', AF_XDP: 'XDP', AF_MCTP: 'MCTP'}
PROTOCOL_NAMES: Final = {IPPROTO_DCCP: 'DCCP', IPPROTO_L2TP: 'L2TP', IPPROTO_SCTP: 'SCTP', IPPROTO_SMC: 'SMC'}


def arguments_of(fd: int) -> tuple[int, int, int]:
    """Return the arguments of socket(2) that made a socket. OSError."""
    # with a family given, the module socket does not ask for it
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(fd)) as sock:
        family, kind, protocol = (sock.getsockopt(socket.SOL_SOCKET, name)
                                  for name in (SO_DOMAIN, socket.SO_TYPE, SO_PROTOCOL))
        return family, kind, protocol


def duplicate_socket(fd: int) -> socket.socket:
    """Return a duplicate of a socket of any family: the module socket finds out the family by getsockname(2), which
    XDP does not have. OSError."""
    family, kind, protocol = arguments_of(fd)
    return socket.socket(family, kind, protocol, fileno=os.dup(fd))

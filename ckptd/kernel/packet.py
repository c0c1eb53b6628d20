# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packet sockets (packet(7)): options that the module socket lacks, and what sock_diag(7) shows of them."""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ckptd.kernel.decl import c_int, c_uint, c_void_p, libc
from ckptd.kernel.inet_diag import attributes, dump

SOL_PACKET: Final = 263                 # <linux/socket.h>
SOCK_PACKET: Final = 10                 # <linux/net.h>, obsolete
# <linux/if_packet.h>
PACKET_ADD_MEMBERSHIP, PACKET_RX_RING, PACKET_COPY_THRESH, PACKET_AUXDATA, PACKET_ORIGDEV = 1, 5, 7, 8, 9
PACKET_VERSION, PACKET_RESERVE, PACKET_TX_RING, PACKET_LOSS, PACKET_VNET_HDR = 10, 12, 13, 14, 15
PACKET_TIMESTAMP, PACKET_FANOUT, PACKET_TX_HAS_OFF, PACKET_QDISC_BYPASS = 17, 18, 19, 20
PACKET_IGNORE_OUTGOING: Final = 23      # since 4.20
PACKET_VNET_HDR_SZ: Final = 24          # since 6.4
PACKET_FANOUT_CBPF, PACKET_FANOUT_EBPF = 6, 7
# <linux/packet_diag.h>
PACKET_SHOW_INFO, PACKET_SHOW_MCLIST, PACKET_SHOW_RING_CFG, PACKET_SHOW_FANOUT = 1, 2, 4, 8
PACKET_DIAG_INFO, PACKET_DIAG_MCLIST, PACKET_DIAG_RX_RING, PACKET_DIAG_TX_RING, PACKET_DIAG_FANOUT = 0, 1, 2, 3, 4
PDI_RUNNING: Final = 1

MAX_ADDR_LEN: Final = 32                # <linux/netdevice.h>: bytes of a hardware address
_REQUEST = struct.Struct('=BBxxII8x')   # struct packet_diag_req
_MESSAGE = struct.Struct('=BBHI8x')     # struct packet_diag_msg
_INFO = struct.Struct('=6I')            # struct packet_diag_info
_MEMBERSHIP = struct.Struct('=IIHH32s')     # struct packet_diag_mclist
_MREQ = struct.Struct('=iHH32s')        # struct packet_mreq_max, net/packet/internal.h
_SOCKADDR_LL = struct.Struct('=HHi12x')  # struct sockaddr_ll
_SOCKADDR = struct.Struct('=H14s')      # struct sockaddr, for SOCK_PACKET


class LinkMembership(NamedTuple):
    """A membership of PACKET_ADD_MEMBERSHIP. type: PACKET_MR_*. joins: how often it was joined."""
    interface: int
    joins: int
    type: int
    address: bytes


class PacketSocket(NamedTuple):
    """A packet socket. protocol: in host byte order. interface: 0 for all."""
    inode: int
    protocol: int
    interface: int
    copy_threshold: int
    is_running: bool
    memberships: tuple[LinkMembership, ...]
    fanout: int | None      # id, and type << 16
    has_ring: bool


def packet_sockets() -> dict[int, PacketSocket]:
    """Return every packet socket of our network namespace, by inode. OSError if sock_diag has none of them."""
    show = PACKET_SHOW_INFO | PACKET_SHOW_MCLIST | PACKET_SHOW_RING_CFG | PACKET_SHOW_FANOUT
    found = (_packet_socket(message) for message in dump(_REQUEST.pack(socket.AF_PACKET, 0, 0, show)))
    return {one.inode: one for one in found}


def _packet_socket(message: bytes) -> PacketSocket:
    _, _, protocol, inode = _MESSAGE.unpack_from(message)
    known = dict(attributes(message[_MESSAGE.size:]))
    interface, _, _, copy_threshold, _, flags = _INFO.unpack_from(known[PACKET_DIAG_INFO])
    fanout = known.get(PACKET_DIAG_FANOUT)
    return PacketSocket(inode, protocol, interface, copy_threshold, bool(flags & PDI_RUNNING),
                        tuple(_memberships(known.get(PACKET_DIAG_MCLIST, b''))),
                        int.from_bytes(fanout, 'little') if fanout is not None else None,
                        bool(known.keys() & {PACKET_DIAG_RX_RING, PACKET_DIAG_TX_RING}))


def _memberships(data: bytes) -> Iterator[LinkMembership]:
    for interface, joins, kind, length, address in _MEMBERSHIP.iter_unpack(data):
        yield LinkMembership(interface, joins, kind, address[:length])


def join(sock: socket.socket, one: LinkMembership) -> None:
    """Join once. OSError."""
    sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP,
                    _MREQ.pack(one.interface, one.type, len(one.address), one.address))


@libc
def _bind(sockfd: c_int, addr: c_void_p, addrlen: c_uint) -> c_int: ...


def bind(sock: socket.socket, interface: str, protocol: int) -> None:
    """Bind a socket to an interface, '' for all. protocol: in host byte order. A SOCK_PACKET has its protocol from
    socket(2). OSError."""
    if sock.type == SOCK_PACKET:
        packed = _SOCKADDR.pack(socket.AF_PACKET, os.fsencode(interface))
    else:
        index = socket.if_nametoindex(interface) if interface else 0
        packed = _SOCKADDR_LL.pack(socket.AF_PACKET, socket.htons(protocol), index)
    address = ctypes.create_string_buffer(packed, len(packed))
    _bind(sock.fileno(), ctypes.addressof(address), len(packed))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Internet sockets as sock_diag(7) shows them: states, addresses, queues, inodes."""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ckptd.kernel.inet import Address
from ckptd.kernel.netlink import NETLINK_SOCK_DIAG, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR

SOCK_DIAG_BY_FAMILY: Final = 20         # <linux/sock_diag.h>
# <linux/inet_diag.h>, attributes
INET_DIAG_INFO, INET_DIAG_SHUTDOWN, INET_DIAG_MD5SIG = 2, 8, 18

_HEADER = struct.Struct('=IHHII')       # struct nlmsghdr
_REQUEST = struct.Struct('=4BI48x')     # struct inet_diag_req_v2, of every socket
_ADDRESSES = struct.Struct('>HH16s16s')  # struct inet_diag_sockid, as far as it is in network byte order
_REST = struct.Struct('=IQ5I')          # its interface and cookie, then the rest of struct inet_diag_msg
_ATTRIBUTE = struct.Struct('=HH')       # struct nlattr: length, type
_ADDRESSES_AT = 4                       # in struct inet_diag_msg
_ATTRIBUTES_AT = _ADDRESSES_AT + _ADDRESSES.size + _REST.size
_EVERY_STATE = (1 << 32) - 1
_RECV = 1 << 16
_ANSWER_TIMEOUT = 0.5   # seconds; a kernel with an answer sends it before sendto(2) returns


class DiagSocket(NamedTuple):
    """An internet socket. inode: 0 for one without an fd, such as one that waits to be accepted, or is in time-wait."""
    inode: int
    state: int          # TCP_* of ckptd.kernel.inet
    local: Address
    peer: Address
    interface: int
    queued: int         # bytes in the receive queue; of a listener, the connections that wait to be accepted
    unsent: int         # bytes that the peer has not acknowledged; of a listener, its backlog
    shutdown: int       # RCV_SHUTDOWN and SEND_SHUTDOWN of <net/sock.h>
    is_signed: bool     # TCP_MD5SIG; only CAP_NET_ADMIN sees that


def inet_sockets(protocol: int) -> list[DiagSocket]:
    """Return every socket of a protocol (IPPROTO_TCP, IPPROTO_UDP ...) in our network namespace, IPv4 and IPv6. OSError
    if sock_diag is not available."""
    # the keys come only together with the information
    wanted = 1 << INET_DIAG_INFO - 1 if protocol == socket.IPPROTO_TCP else 0
    return [_socket(message) for family in (socket.AF_INET, socket.AF_INET6)
            for message in dump(_REQUEST.pack(family, protocol, wanted, 0, _EVERY_STATE))]


def dump(body: bytes) -> Iterator[bytes]:
    """Yield the answers to a request for all sockets of a family, without their headers. body: of the request, which
    begins with the family. OSError."""
    header = _HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as sock:
        sock.settimeout(_ANSWER_TIMEOUT)
        sock.sendto(header + body, (0, 0))
        while True:
            data = sock.recv(_RECV)
            kind = _HEADER.unpack_from(data)[1]
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                number = -struct.unpack_from('=i', data, _HEADER.size)[0]
                if number:
                    raise OSError(number, f'sock_diag: {os.strerror(number)}')
                return
            yield from _messages(data)


def _messages(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if kind != SOCK_DIAG_BY_FAMILY or length < _HEADER.size:
            return
        yield data[at + _HEADER.size:at + length]
        at += length + 3 & ~3


def _socket(message: bytes) -> DiagSocket:
    family, state = message[:2]
    port, peer_port, local, peer = _ADDRESSES.unpack_from(message, _ADDRESSES_AT)
    interface, _, _, queued, unsent, _, inode = _REST.unpack_from(message, _ADDRESSES_AT + _ADDRESSES.size)
    known = dict(attributes(message[_ATTRIBUTES_AT:]))
    return DiagSocket(inode, state, Address(_host(family, local), port), Address(_host(family, peer), peer_port),
                      interface, queued, unsent, int.from_bytes(known.get(INET_DIAG_SHUTDOWN, b''), 'little'),
                      INET_DIAG_MD5SIG in known)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, value) of each struct nlattr."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[at + _ATTRIBUTE.size:at + length]
        at += length + 3 & ~3


def _host(family: int, address: bytes) -> str:
    return socket.inet_ntop(family, address[:4] if family == socket.AF_INET else address)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TCP segment (RFC 9293) that this machine gets as if the peer of a connection had sent it, by a raw socket (raw(7))
with the header of IP. Only root can send one."""

import socket
import struct
from typing import Final, NamedTuple

FIN, ACK = 0x01, 0x10               # RFC 9293, section 3.1
_TCP: Final = struct.Struct('>HHIIBBHHH')       # without options
_IPV4 = struct.Struct('>BBHHHBBH4s4s')
_IPV6 = struct.Struct('>IHBB16s16s')
_TTL = 64


class Segment(NamedTuple):
    """The numbers of a segment without data. window: as it is in the segment, scaled."""
    flags: int
    sequence: int
    acknowledged: int
    window: int


def deliver(family: int, source: tuple[str, int], target: tuple[str, int], segment: Segment) -> None:
    """Let the kernel process a segment from `source` to an address of this machine. family: of the packet, AF_INET or
    AF_INET6. OSError."""
    ends = [socket.inet_pton(family, host) for host, _ in (source, target)]
    tcp = _packed(segment, source[1], target[1], ends)
    if family == socket.AF_INET:
        # the kernel fills in the total length, the identification and the checksum
        header = _IPV4.pack(0x45, 0, 0, 0, 0, _TTL, socket.IPPROTO_TCP, 0, *ends)
    else:
        header = _IPV6.pack(6 << 28, len(tcp), socket.IPPROTO_TCP, _TTL, *ends)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        sock.sendto(header + tcp, (target[0], 0))


def _packed(segment: Segment, source: int, target: int, ends: list[bytes]) -> bytes:
    fields = (source, target, segment.sequence, segment.acknowledged, _TCP.size // 4 << 4, segment.flags,
              segment.window)
    pseudo = b''.join(ends) + struct.pack('>HH', socket.IPPROTO_TCP, _TCP.size)
    return _TCP.pack(*fields, _checksum(pseudo + _TCP.pack(*fields, 0, 0)), 0)


def _checksum(data: bytes) -> int:
    """Return the checksum of the internet (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f'>{len(data) // 2}H', data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

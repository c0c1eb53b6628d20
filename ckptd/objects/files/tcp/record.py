# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of a TCP connection in an image, and the order in which connections wait to be accepted."""

import socket
from collections.abc import Iterator, Sequence

from ckptd.errors import ImageDamaged
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import Extent
from ckptd.kernel import inet, unix
from ckptd.kernel.inet import Address
from ckptd.objects.files.inet.socket import InetAddress, InetSocket, given_address
from ckptd.objects.files.tcp.agreement import Agreement
from ckptd.objects.files.tcp.keep import KeptConnection
from ckptd.objects.files.tcp.table import plain

# the other end
# in the tree; closed; waits in the tree to be accepted; outside of the tree, where a policy resets the connection
INSIDE, CLOSED, WAITING, RESET = 1, 2, 3, 4
TICK = 10                  # milliseconds: the longest jiffy, in which the kernel counts the time of packets


@layout
class TcpConnection(Struct):
    """One end of a connection. Its queue has `data`, then an urgent byte (MSG_OOB) if there is one, then `later`: what
    was received, and what the other end had sent."""
    socket: InetSocket
    other: U8                       # INSIDE, CLOSED, WAITING or RESET
    state: U8                       # TCP_* of ckptd.kernel.inet
    peer: tuple[InetAddress, ...]   # none in the state CLOSE
    peer_family: U32                # family of the other end, if it is in the tree
    since: U64                      # milliseconds: time of the last packet, which orders the connections that wait
    inode: U64                      # orders those of one moment
    shutdown: U8                    # RCV_SHUTDOWN and SEND_SHUTDOWN of <net/sock.h>
    data: tuple[Extent, ...]
    urgent: bytes
    later: tuple[Extent, ...]
    agreed: Agreement = Agreement()
    peer_agreed: Agreement = Agreement()    # of the other end, if it is in the tree
    kept: tuple[KeptConnection, ...] = ()   # one, if the policy is to go on with it; with RESET, if that fails


def in_order(rows: Sequence[tuple[TcpConnection, int, str]]) -> Iterator[tuple[TcpConnection, int, str]]:
    """Yield the connections as they were made. Those of one moment are ordered by their inodes, which grow."""
    group: list[tuple[TcpConnection, int, str]] = []
    for row in sorted(rows, key=lambda row: row[0].since):
        if group and row[0].since - group[-1][0].since >= TICK:
            yield from sorted(group, key=lambda row: row[0].inode)
            group.clear()
        group.append(row)
    yield from sorted(group, key=lambda row: row[0].inode)


def loopback(family: int) -> Address:
    """Return the address of this machine for itself, with any port."""
    return Address('127.0.0.1' if family == socket.AF_INET else '::1', 0)


def addresses(record: TcpConnection) -> tuple[Address, Address]:
    """Return the addresses of both ends. The other end of a closed connection gets any. ImageDamaged."""
    family = record.socket.family
    own = next((given_address(one, family) for one in record.socket.bound), loopback(family))
    peer = next((given_address(one, family) for one in record.peer), own._replace(port=0))
    if (record.other in (INSIDE, WAITING) or record.kept) and not (own.port and peer.port and record.peer):
        raise ImageDamaged(f'a connection from {own} to {peer}')
    return own, own._replace(port=0) if record.other == RESET else peer


def closed_directions(record: TcpConnection) -> int:
    """Return RCV_SHUTDOWN and SEND_SHUTDOWN for the end itself. A FIN of the other end does the rest."""
    if record.state == inet.TCP_CLOSE:
        return unix.SEND_SHUTDOWN
    if record.state in inet.HAVE_RECEIVED_FIN:
        return record.shutdown & unix.SEND_SHUTDOWN
    return record.shutdown


def tcp_end(own: Address, peer: Address) -> tuple[str, Address, Address]:
    """Return the key by which the files of a restart share an end (RestoreContext.once)."""
    return 'tcp end', plain(own), plain(peer)


def lost() -> int:
    raise ImageDamaged('the other end of a connection is not in the image')

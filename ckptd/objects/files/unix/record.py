# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of a unix socket."""

from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.objects.files.options import SocketOption
from ckptd.objects.files.socket_filter import NO_FILTER, SocketFilter
from ckptd.objects.files.unix.messages import NOBODY, Sender, UnixMessage
from ckptd.objects.files.unix.names import NO_NAME, SocketName

ONE_WAY, BOTH_WAYS = 1, 2       # of UnixSocketEnd.joined
THIS_END, OTHER_END = 1, 2      # of UnixSocketEnd.accepted


@layout
class WaitingClient(Struct):
    """A client that waits to be accepted."""
    inode: U64                      # 0 for one that is closed
    name: SocketName
    maker: Sender                   # a process that has it, whose ids the accepted socket tells (SO_PEERCRED)
    groups: tuple[U32, ...]
    queue: tuple[UnixMessage, ...]  # what it has sent


@layout
class UnixSocketEnd(Struct):
    """One end of a connection, or a socket that has none."""
    inode: U64
    type: U32
    peer: U64                       # inode of the other end, 0 for none
    connected: U8                   # with peer 0: the other end is gone
    shutdown: U8                    # RCV_SHUTDOWN and SEND_SHUTDOWN of <net/sock.h>
    maker: Sender                   # SO_PEERCRED; of a listener, the process that called listen(2)
    groups: tuple[U32, ...]         # SO_PEERGROUPS
    uid: U32                        # of the socket itself (fchown(2))
    gid: U32                        # likewise
    options: tuple[SocketOption, ...]
    queue: tuple[UnixMessage, ...]
    filter: SocketFilter = NO_FILTER
    name: SocketName = NO_NAME
    peer_name: SocketName = NO_NAME
    peer_maker: Sender = NOBODY     # SO_PEERCRED of the other end
    peer_groups: tuple[U32, ...] = ()
    accepted: U8 = 0                # which end a listener has accepted: THIS_END, OTHER_END, 0 for none
    joined: U8 = 0                  # a datagram socket that has called connect(2): ONE_WAY; BOTH_WAYS, as its peer has
    listening: U8 = 0
    backlog: U32 = 0                # of listen(2)
    waiting: tuple[WaitingClient, ...] = ()     # of a listener, first come first
    waits: U8 = 0                   # such a client
    outside: U8 = 0                 # connected to the peer_name outside of the tree, and to be connected there again
    identifier: str = ''            # of a process that has it, for the journal
    addresses: tuple[bytes, ...] = ()       # of datagrams in the queue: names of their senders; none if all are b''

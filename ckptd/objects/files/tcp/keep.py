# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TCP connection to the outside that a restart goes on with (--external=...:keep), for root.

    checkpoint --kill   a packet filter drops its packets, in both directions, until the restart or a deadline. Then its
                        state is read in repair mode (TCP_REPAIR). The reset that the end of the tree sends is dropped.
    restart             a new socket gets the state in repair mode, the filter is taken away, and a window probe tells
                        both ends how far they are. A FIN that the tree has sent is sent again; one that it has received
                        is given to the socket as if the peer sent it again.

The peer sees a pause. After the deadline, or another boot, it gets a reset from the kernel, and the tree one as well.
The kernel removes the elements of the filter at the deadline by itself (kernel/nftables.py).
"""

import errno
import os
import secrets
import socket
import time
from collections.abc import Iterable

from ckptd.errors import CkptError
from ckptd.faults import fault
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import Extent
from ckptd.journal.steps import DropPackets, HeldSocket, RepairSockets
from ckptd.kernel import inet, tcp
from ckptd.kernel.inet import Address, local_address, peer_address, sockaddr, tcp_state
from ckptd.kernel.nftables import TcpEnds, drop_connections, remove_table, tables
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import boot_id
from ckptd.objects.files.base import Content, OpenFile, RestoreContext
from ckptd.objects.files.tcp.handshake import bound

PATIENCE = 900          # seconds: as long as a peer with unanswered packets waits (tcp_retries2 of tcp(7))
_TABLE = 'ckptd-'
_MARGIN = 2             # seconds that a restart needs


@layout
class KeptConnection(Struct):
    """The state of a connection with which a restart can go on, see kernel.tcp.Repair."""
    table: str                      # of the packet filter
    boot: str                       # id of the boot
    until: U64                      # deadline: milliseconds of CLOCK_BOOTTIME
    received: U32
    sent: U32
    mss: U32
    options: U8
    send_scale: U8
    receive_scale: U8
    timestamp: U32
    window: bytes
    unread: tuple[Extent, ...]      # the receive queue
    unacknowledged: tuple[Extent, ...]      # the send queue
    advertised: U32 = 0
    state: U8 = inet.TCP_ESTABLISHED        # TCP_* of ckptd.kernel.inet, when its packets were dropped

    @property
    def repair(self) -> tcp.Repair:
        return tcp.Repair(self.received, self.sent, self.mss, self.options, self.send_scale, self.receive_scale,
                          self.timestamp, self.window, self.advertised)

    @property
    def is_held(self) -> bool:
        """Whether a restart can go on with it here and now."""
        return (os.geteuid() == 0 and self.boot == boot_id() and _now() + _MARGIN * 1000 < self.until
                and self.table in _our_tables())


def _our_tables() -> Iterable[str]:
    try:
        return [name for name in tables() if name.startswith(_TABLE)]
    except OSError:         # without CAP_NET_ADMIN, or without nftables
        return ()


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


# ---------------------------------------------------------------- dump

class TcpKeeper:
    """The connections of one dump that are kept."""

    def __init__(self) -> None:
        self._table = f'{_TABLE}{secrets.token_hex(8)}'
        self._held: list[TcpEnds] = []
        self._until = 0

    def keep(self, file: OpenFile, content: Content) -> KeptConnection | None:
        """Cut off a connection and read its state; the tree is killed afterwards. None if it is over. CkptError."""
        with file.as_socket() as sock:
            peer = peer_address(sock)
            if peer is None or tcp_state(sock).state == inet.TCP_CLOSE:
                return None
            self._drop(TcpEnds(_end(local_address(sock)), _end(peer)), file, content)
            now = tcp_state(sock).state         # no packet changes it any more
            content.note(RepairSockets((HeldSocket(file.pid, read_stat(file.pid).start_time, file.fd),)))
            with tcp.in_repair(sock):
                stream = tcp.peek_whole(sock)
                state = tcp.read_repair(sock, has_received_fin=now in inet.HAVE_RECEIVED_FIN,
                                        has_sent_fin=now in inet.HAVE_SENT_FIN)
                queued = tcp.peek_send_queue(sock)
        if stream is None:
            raise not_now(file, 'urgent data waits in it')
        fault('taken-one')
        return KeptConnection(self._table, boot_id(), self._until, state.received, state.sent, state.mss, state.options,
                              state.send_scale, state.receive_scale, state.timestamp, state.window,
                              keep_bytes(stream, content), keep_bytes(queued, content), state.advertised, now)

    def _drop(self, connection: TcpEnds, file: OpenFile, content: Content) -> None:
        """Drop its packets from here on, with those of the connections before."""
        self._held.append(connection)
        self._until = _now() + PATIENCE * 1000
        content.note(DropPackets(self._table))
        try:
            drop_connections(self._table, self._held, PATIENCE * 1000)
        except OSError as error:
            raise CkptError(f'{file.link} of process {file.pid} cannot be kept: {error}', errno=error.errno,
                            task=file.pid, resource=f'fd {file.fd}', hint='a kernel with nftables and CAP_NET_ADMIN '
                            'are needed; --external=...:close resets the connection') from error


def not_now(file: OpenFile, why: str) -> CkptError:
    """Return the error of a connection whose data is in the way."""
    return CkptError(f'{file.link} of process {file.pid}: {why}', errno=errno.EAGAIN, task=file.pid,
                     resource=f'fd {file.fd}', hint='try again when the program has read some of it')


def _end(address: Address) -> tuple[str, int]:
    return address.plain, address.port


def keep_bytes(data: bytes, content: Content) -> tuple[Extent, ...]:
    """Write bytes into the image. Return one extent, or none for no bytes."""
    return (content.add([data]),) if data else ()


# ---------------------------------------------------------------- restart

def make_kept(family: int, own: Address, peer: Address, kept: KeptConnection, link: str, ctx: RestoreContext) -> int:
    """Return a socket in repair mode that is this end of the connection. CkptError."""
    unread, unacknowledged = (b''.join(ctx.pread(extent, extent.length, 0) for extent in extents)
                              for extents in (kept.unread, kept.unacknowledged))
    with bound(family, own, link) as sock:
        try:
            tcp.enter_repair(sock)
            tcp.connect_in_repair(sock, sockaddr(family, peer), kept.repair, len(unread), len(unacknowledged))
            tcp.fill_queue(sock, tcp.TCP_RECV_QUEUE, unread)
            tcp.fill_queue(sock, tcp.TCP_SEND_QUEUE, unacknowledged)
            tcp.set_window(sock, kept.window)
        except OSError as error:
            raise CkptError(f'{link}: the connection from {own} to {peer} cannot be gone on with: {error.strerror}',
                            errno=error.errno, resource=link,
                            hint='after its deadline it is restored as a connection that its peer has reset'
                            ) from error
        return sock.detach()


def go_on(sock: socket.socket, kept: KeptConnection) -> None:
    """Let the connection run."""
    remove_table(kept.table)
    if kept.state in inet.HAVE_RECEIVED_FIN:
        tcp.leave_repair(sock)
        tcp.receive_fin(sock, kept.repair, sum(extent.length for extent in kept.unacknowledged))
        return
    tcp.resume(sock)


def let_go(kept: KeptConnection) -> None:
    """Take the packet filter away: the connection is not gone on with."""
    if kept.table in _our_tables():
        remove_table(kept.table)

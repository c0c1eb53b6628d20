# SPDX-License-Identifier: LGPL-2.1-or-later
"""A TCP connection (tcp(7)) whose both ends are in the tree, or whose other end is closed.

A restart connects the two ends again by a real handshake, before the listener of their port listens, and each end sends
what the other one has not read. So no process gets a connection with numbers of an image's choice. An end whose other
end is closed gets one for a moment, which sends, and is closed. A connection that waits to be accepted is connected
again when the listener listens (waiting.py). One to the outside that is kept: keep.py.

At the dump the tree is at rest, and the kernel delivers what is on its way. Bytes that do not fit into the other end's
queue are read from the send queue, which root may do (TCP_REPAIR).
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from ckptd.errors import CkptError, Finding
from ckptd.external import Policy, tcp_peer
from ckptd.faults import fault
from ckptd.image.records import SavedFile
from ckptd.kernel import inet, tcp, unix
from ckptd.kernel.inet import Address, last_packet, local_address, peer_address, tcp_state
from ckptd.kernel.inet_diag import DiagSocket
from ckptd.objects.files.base import Content, Endpoint, FileEnd, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import set_owner, socket_findings
from ckptd.objects.files.inet.options import set_inet_options
from ckptd.objects.files.inet.socket import (
    dump_socket,
    foreign_findings,
    given_address,
    keep_address,
    probe,
    require_dumpable,
    rights,
    settle,
    shut_down,
    socket_type,
)
from ckptd.objects.files.socket_filter import set_filter
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.tcp.agreement import Agreement, read_agreement
from ckptd.objects.files.tcp.handshake import FirstFins, MadeEnd, bound, connect_pair, send_all
from ckptd.objects.files.tcp.keep import TcpKeeper, go_on, keep_bytes, let_go, make_kept, not_now
from ckptd.objects.files.tcp.outside import connection_findings, kept_finding, outside_finding
from ckptd.objects.files.tcp.record import (
    CLOSED,
    INSIDE,
    RESET,
    WAITING,
    TcpConnection,
    addresses,
    closed_directions,
    loopback,
    lost,
    tcp_end,
)
from ckptd.objects.files.tcp.socket import feature_findings, is_connection
from ckptd.objects.files.tcp.table import TcpTable, plain
from ckptd.objects.files.tcp.unsent import read_unsent
from ckptd.objects.files.tcp.waiting import WaitingConnections, stream_of
from ckptd.objects.support import Support


class TcpConnectionKind(Kind[TcpConnection], tag='tcp-connection'):
    support = Support('TCP connections within the tree, with unread bytes; for root also to the outside',
                      refused='connections to the outside without --external, MPTCP connections, kTLS and other upper '
                              'layer protocols, pending errors, unread bytes of a connection that nobody has accepted, '
                              'without --kill',
                      user='unsent bytes that do not fit into the queue of the other end are refused')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._ends: dict[tuple[Address, Address], tuple[OpenFile, int]] = {}    # by addresses: end and its family
        self._pairs: dict[int, tuple[Address, Address]] = {}                    # by inode: addresses
        self._others: dict[int, int] = {}               # by inode: INSIDE, CLOSED or WAITING
        self._received: dict[int, tcp.Stream] = {}      # by inode
        self._unsent: dict[int, bytes] = {}             # by inode of the sender
        self._temporary: dict[int, int] = {}            # by file_id: an end that is being made
        self._waiting, self._fins = WaitingConnections(), FirstFins()
        self._policies: dict[int, Policy] = {}          # by inode: of connections to the outside
        self._keeper = TcpKeeper()
        self._held: dict[int, bool] = {}                # by file_id: whether the restart goes on with it

    def matches(self, file: OpenFile) -> bool:
        kind = socket_type(file, self._tables)
        if kind is None or kind.type != socket.SOCK_STREAM or kind.protocol != socket.IPPROTO_TCP or (
                kind.family not in (socket.AF_INET, socket.AF_INET6)):
            return False
        with file.as_socket() as sock:
            return is_connection(sock)

    def findings(self, file: OpenFile) -> list[Finding]:
        kind = socket_type(file, self._tables)
        if kind and (found := foreign_findings(file, kind)):
            return found
        with file.as_socket() as sock:
            return [*connection_findings(file, sock), *feature_findings(file, sock, self._tables)]

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        kind = socket_type(file, self._tables)
        if kind is None or kind.foreign:
            return None
        with file.as_socket() as sock:
            own, far = plain(local_address(sock)), peer_address(sock)
        if far is None:         # both directions are closed
            return None
        peer = plain(far)
        self._ends[own, peer], self._pairs[file.stat.st_ino] = (file, kind.family), (own, peer)
        low, high = sorted((str(own), str(peer)))
        return Endpoint((f'{self.tag} {low} {high}', 0, 0), frozenset({str(own)}), frozenset({str(peer)}))

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        table = TcpTable()
        pairs = [self._pairs[end.file.stat.st_ino] for end in ends]
        table.look_up_holders((own, peer) for own, peer in pairs if (peer, own) not in self._ends)
        for end, (own, peer) in zip(ends, pairs, strict=True):
            if (peer, own) in self._ends:
                self._others[end.file.stat.st_ino] = INSIDE
                continue
            with suppress(FileNotFoundError):       # the running tree has closed it since
                if reason := self._elsewhere(end.file, own, peer, table, is_whole=is_whole):
                    yield end, reason

    def _elsewhere(self, file: OpenFile, own: Address, peer: Address, table: TcpTable, *,
                   is_whole: bool) -> Finding | None:
        """Find the other end of a connection that is in no fd table of the tree."""
        inode, other = file.stat.st_ino, table.get(peer, own)
        if other and other.inode:
            holder = table.holder(other.inode)
            # the tree may have opened it since, or it is in flight, which is looked at when the tree is at rest
            is_ours = holder is None or holder.pid in (self._tables.tasks or ())
            return self._outside(file, peer, holder) if is_whole or not is_ours else None
        if other and (listener := table.listener(peer)):
            return self._not_accepted(file, other, peer, table.holder(listener.inode))
        if other is None and not is_whole and table.is_local(peer):
            return None         # this end may be closed by now, too
        with file.as_socket() as sock:
            state = tcp_state(sock).state
        if state in (inet.TCP_CLOSE_WAIT, inet.TCP_LAST_ACK) and table.is_local(peer):
            self._others[inode] = CLOSED
            if other and other.unsent > 1:
                return finding('EAGAIN', f'{file.link} has not received all that its closed peer {peer} has sent',
                               'try again when the program has read some of it')
            return None
        return self._outside(file, peer)

    def _not_accepted(self, file: OpenFile, other: DiagSocket, peer: Address, holder: unix.Holder | None
                      ) -> Finding | None:
        if holder is None or holder.pid not in (self._tables.tasks or ()):
            return self._outside(file, peer, holder)
        self._others[file.stat.st_ino] = WAITING
        with file.as_socket() as sock:
            # a FIN counts as a byte
            has_sent = other.queued > (other.state == inet.TCP_CLOSE_WAIT) or tcp.unsent(sock)
        if has_sent and self._tables.is_taken:
            self._waiting.add_sender(file, peer)
        elif has_sent:
            return finding('EAGAIN', f'{file.link} is a connection that {holder.comm}[{holder.pid}] has not accepted, '
                           'with bytes that only accept(2) can reach',
                           'try again when the program has accepted it, or use --kill, which keeps them')
        return None

    def _outside(self, file: OpenFile, peer: Address, holder: unix.Holder | None = None) -> Finding:
        """Return the row about a connection to the outside, by the policy for its peer."""
        what = tcp_peer(peer.host, peer.port)
        action, inode = self._tables.external.action_of(what), file.stat.st_ino
        row = outside_finding(file, peer, holder, action, what)
        if row.severity != 'refusal':
            self._others[inode], self._policies[inode] = RESET, Policy(what, action)
        return row

    # ------------------------------------------------------------ queues

    def peek_offset(self, file: OpenFile) -> int | None:
        with file.as_socket() as sock:
            return None if unix.has_error(sock) else tcp.peek_offset(sock)

    def discover(self, file: OpenFile) -> Sequence[int]:
        if file.stat.st_ino in self._received:
            return ()
        with file.as_socket() as sock:
            if unix.has_error(sock):
                return ()
            before = tcp.peek_offset(sock)
            own, peer = local_address(sock), peer_address(sock)
            if peer:
                self._ends[plain(own), plain(peer)] = file, sock.family
                if other := self._ends.get((plain(peer), plain(own))):
                    with other[0].as_socket() as far:
                        self._unsent[file.stat.st_ino] = read_unsent(file, sock, other[0], far)
                        self._unsent[other[0].stat.st_ino] = read_unsent(other[0], far, file, sock)
            try:
                self._received[file.stat.st_ino] = tcp.peek_stream(sock)
                fault('queue-walked')
            except BlockingIOError as error:
                raise not_now(file, error.strerror or 'urgent data waits in it') from error
            finally:
                tcp.set_peek_offset(sock, before)
        return ()

    # ------------------------------------------------------------ dump

    def dump(self, file: OpenFile, content: Content) -> TcpConnection:
        require_dumpable(file, self.findings(file))
        inode = file.stat.st_ino
        received = self._received.get(inode, tcp.Stream(b''))
        with file.as_socket() as sock:
            own, peer, state = local_address(sock), peer_address(sock), tcp_state(sock).state
            common = dump_socket(file, sock, is_connected=True)
            since, agreed, peer_agreed = last_packet(sock), read_agreement(sock), Agreement()
        other = self._ends.get((plain(peer), plain(own))) if peer else None
        if peer and self._others.get(inode) == WAITING:
            self._waiting.look_for_listener(peer, content)
        if other:
            with other[0].as_socket() as far:
                peer_agreed = read_agreement(far)
        later = received.later + (self._unsent.get(other[0].stat.st_ino, b'') if other else b'')
        known = self._tables.inet_sockets(socket.IPPROTO_TCP).get(inode)
        return TcpConnection(common, self._others.get(inode, CLOSED), state, (keep_address(peer),) if peer else (),
                             other[1] if other else common.family, since, inode, known.shutdown if known else 0,
                             keep_bytes(received.data, content), received.urgent, keep_bytes(later, content), agreed,
                             peer_agreed)

    def inherited(self, file: OpenFile) -> str:
        policy = self._policies.get(file.stat.st_ino)
        return policy.what if policy and policy.action == 'inherit' else ''

    def take(self, record: TcpConnection, file: OpenFile, content: Content) -> TcpConnection:
        if record.other == WAITING:
            return self._waiting.take(record, file, self._ends, content)
        policy = self._policies.get(file.stat.st_ino)
        if policy is None or policy.action != 'keep':
            return record
        kept = self._keeper.keep(file, content)
        return replace(record, kept=(kept,)) if kept else record

    def die(self, file: OpenFile) -> None:
        """Let the end of the tree close the connection without a trace: time-wait would hold its port for a minute."""
        with suppress(OSError), file.as_socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('=ii', 1, 0))

    def leaves(self, record: TcpConnection) -> bool:
        return bool(record.kept)

    def forget(self, record: TcpConnection) -> None:
        for kept in record.kept:
            let_go(kept)

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: TcpConnection, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        one = record.socket
        is_held = any(kept.is_held for kept in record.kept)
        if (record.other == RESET and not is_held) or record.state == inet.TCP_CLOSE:
            one = replace(one, bound=())        # it has no port any more, or another one does as well
        found = [*socket_findings(saved.link, one.uid, one.gid, lookup), *probe(one, saved, lookup)]
        if record.kept and not is_held:
            found.append(kept_finding(saved.link))
        return found

    def create(self, record: TcpConnection, saved: SavedFile, ctx: RestoreContext) -> int:
        one, (own, peer) = record.socket, addresses(record)
        with rights(ctx):
            if self._is_held(record, saved):
                far = given_address(record.peer[0], one.family)
                fd = make_kept(one.family, own, far, record.kept[0], saved.link, ctx)
            elif record.other == INSIDE:
                fd = os.dup(self._inside(record, own, peer, saved, ctx))
            elif record.other == WAITING:
                fd = bound(one.family, own, saved.link).detach()
            else:
                fd = self._closed(record, own, peer, saved, ctx)
        try:
            set_owner(fd, saved.mode, one.uid, one.gid, ctx)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _is_held(self, record: TcpConnection, saved: SavedFile) -> bool:
        """Whether the restart goes on with the connection. It is decided once."""
        return self._held.setdefault(saved.file_id, any(kept.is_held for kept in record.kept))

    def _inside(self, record: TcpConnection, own: Address, peer: Address, saved: SavedFile, ctx: RestoreContext) -> int:
        """Return the fd of an end of a connection that is made once, with both ends."""
        def make() -> int:
            mine, theirs = connect_pair(MadeEnd(record.socket.family, own, record.agreed),
                                        MadeEnd(record.peer_family, peer, record.peer_agreed), saved.link)
            ctx.once(tcp_end(peer, own), lambda: theirs)
            return mine
        return ctx.once(tcp_end(own, peer), make)

    def _closed(self, record: TcpConnection, own: Address, peer: Address, saved: SavedFile, ctx: RestoreContext) -> int:
        """Return the fd of an end whose other end is going to be closed."""
        def make() -> int:
            family = record.socket.family
            try:
                mine, theirs = connect_pair(MadeEnd(family, own, record.agreed), MadeEnd(family, peer), saved.link)
            except CkptError as error:
                is_over = record.other == RESET or record.state == inet.TCP_CLOSE
                if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL) or not is_over:
                    raise
                free = loopback(family)
                mine, theirs = connect_pair(MadeEnd(family, free, record.agreed), MadeEnd(family, free), saved.link)
            self._temporary[saved.file_id] = mine
            return theirs
        ctx.once(('tcp closed', saved.file_id), make)
        return self._temporary.pop(saved.file_id)

    def connect(self, record: TcpConnection, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        one = record.socket
        own, peer = addresses(record)
        with rights(ctx), socket.socket(fileno=os.dup(fd)) as sock:
            if self._is_held(record, saved):
                pass
            elif record.other != WAITING:
                key = tcp_end(peer, own) if record.other == INSIDE else ('tcp closed', saved.file_id)
                with socket.socket(fileno=os.dup(ctx.once(key, lost))) as far:
                    send_all(far, sock, stream_of(record, ctx), saved.link)
                    if record.other == CLOSED:
                        far.shutdown(socket.SHUT_WR)
            else:
                self._waiting.add_to_connect(record, fd, saved.link)
            set_inet_options(sock, one.options, saved.link)
            set_filter(sock, one.filter, saved.link)
            settle(sock, one, saved.link)

    def watch(self, record: TcpConnection, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.other == INSIDE and record.state in (inet.TCP_FIN_WAIT1, inet.TCP_FIN_WAIT2, inet.TCP_CLOSING):
            self._fins.send(fd, record.state)

    def commit(self, record: TcpConnection, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        self._waiting.connect_all(ctx)      # the listeners listen by now
        self._fins.await_answers()
        for kept in record.kept:
            if self._is_held(record, saved):
                with socket.socket(fileno=os.dup(fd)) as sock:
                    go_on(sock, kept)
                shut_down(fd, record.shutdown & (unix.SEND_SHUTDOWN if kept.state in inet.HAVE_RECEIVED_FIN else ~0))
                return
            let_go(kept)
        if record.other == RESET:
            with socket.socket(fileno=os.dup(ctx.once(('tcp closed', saved.file_id), lost))) as far:
                tcp.reset(far)
            return
        shut_down(fd, closed_directions(record))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unix socket (unix(7)): listening, bound, connected to another one of the tree, disconnected from one that is gone,
or fresh.

sock_diag(7) shows the inode of the peer, so both ends are found wherever they are: in an fd table, or in flight in the
queue of a third socket. A queue is read with MSG_PEEK, message by message, and the other end sends it again.

A restart makes each connection once, by the processes that SO_PEERCRED names to its ends: by socketpair(2) if both ends
have no name, else by listen(2), connect(2) and accept(2), because an accepted socket has the name of its listener.
Files in flight are files of the image like others. The queues are filled when all of them are open, so a socket may be
in flight in itself. Connections that nobody has accepted yet are made last, in their order.

The connection to the bus of a program that checkpoints itself is disconnected: after a restart it reads end-of-file.
"""

import os
import socket
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckptd.errors import Finding
from ckptd.external import ANY, Action
from ckptd.image.records import SavedFile
from ckptd.kernel import unix, unix_queue
from ckptd.kernel.netlink import UnixSocket
from ckptd.kernel.status import read_status
from ckptd.objects.files.base import Content, Endpoint, FileEnd, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import set_owner, socket_findings
from ckptd.objects.files.options import SocketOption, dump_options, set_options
from ckptd.objects.files.socket_filter import SocketFilter, dump_filter, filter_findings, set_filter
from ckptd.objects.files.socket_queue import offset_to_restore, read_queue
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.unix.connections import connect_waiting, fill, listen, make_socket, take_clients
from ckptd.objects.files.unix.messages import NOBODY, Sender, dump_message, dump_sender
from ckptd.objects.files.unix.names import NO_NAME, SocketName, connect_to, dump_name, name_findings, name_refusals
from ckptd.objects.files.unix.outside import action_for, outside_findings, reconnect, reconnect_findings, what_of
from ckptd.objects.files.unix.record import BOTH_WAYS, ONE_WAY, OTHER_END, THIS_END, UnixSocketEnd, WaitingClient
from ckptd.objects.files.unsupported import describe
from ckptd.objects.support import Support


class _Known(NamedTuple):
    """A socket of the tree, and what SO_PEERCRED and SO_PEERGROUPS tell of it."""
    file: OpenFile
    maker: unix.SocketCredentials
    groups: tuple[int, ...]


class UnixKind(Kind[UnixSocketEnd], tag='unix'):
    support = Support('unix sockets with their names, listeners, connections, unread messages and files in flight',
                      refused='connections to processes outside of the tree without --external; eBPF filters; '
                              'unread data of connections that nobody has accepted, without --kill',
                      user='messages with credentials of their senders are refused')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._queues: dict[int, list[unix_queue.Queued]] = {}     # by inode, each read once
        self._known: dict[int, _Known] = {}                       # by inode
        self._outside: dict[tuple[int, int], Action] = {}         # by inode, and that of the peer outside of the tree

    def matches(self, file: OpenFile) -> bool:
        if not stat.S_ISSOCK(file.stat.st_mode) or file.is_path:
            return False
        if file.severed:
            return True
        own = self._own(file)
        if own is None or own.state not in (unix.SS_ESTABLISHED, unix.SS_UNCONNECTED, unix.SS_LISTEN):
            return False
        if own.has_peer and not own.peer and own.type != socket.SOCK_DGRAM:
            with file.as_socket() as sock:
                return unix.other_end_gone(sock, own) or self._listener_of(own) is not None
        return True

    def findings(self, file: OpenFile) -> list[Finding]:
        if file.severed:
            return [finding('EPIPE', f'{file.link} is a connection to the bus', 'after a restart it reads end-of-file',
                            'warning')]
        own = self._own(file)
        with file.as_socket() as sock:
            if unix.has_error(sock):
                return [finding('EIO', f'{file.link} has a pending error, which reading would consume',
                                'let the program read it (SO_ERROR) before the checkpoint')]
            self._known[file.stat.st_ino] = _Known(file, unix.peer_credentials(sock), unix.peer_groups(sock))
            found = filter_findings(sock, f'{describe(file, self._tables)} ({file.link})')
            found += name_refusals(own, sock, file.tid, self._tables) if own else []
        return found

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        own = self._own(file)
        if file.severed or own is None:
            return None
        listener = self._listener_of(own)
        others = {own.peer, listener.inode if listener else 0, *own.pending} - {0}
        return Endpoint(('unix', own.inode, own.peer), frozenset({str(own.inode)}), frozenset(map(str, others)))

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        held = {name for end in ends for name in end.endpoint.holds}
        lacking = [end for end in ends if not end.endpoint.lacks <= held]
        holders = unix.find_holders({int(peer) for end in lacking for peer in end.endpoint.lacks - held})
        if not self._tables.is_taken:
            yield from self._unreachable(ends, held)
        for end in lacking:
            own = self._tables.unix_sockets[end.file.stat.st_ino]
            for inode in sorted(map(int, end.endpoint.lacks - held)):
                holder, peer = holders.get(inode), self._tables.unix_sockets.get(inode)
                if holder is None and not is_whole:
                    continue        # it may be in flight within the tree, which is checked when the tree is at rest
                action = action_for(own, peer, self._tables)
                self._outside[own.inode, inode] = action
                yield from outside_findings(end, own, peer, holder, action, self._tables)

    def _unreachable(self, ends: Sequence[FileEnd], held: set[str]) -> Iterator[tuple[FileEnd, Finding]]:
        """Yield listeners with connections of the tree whose data only accept(2) reaches."""
        for end in ends:
            pending = self._tables.unix_sockets[end.file.stat.st_ino].pending
            if self._has_unread([inode for inode in pending if not inode or str(inode) in held]):
                yield end, finding('EAGAIN', f'{describe(end.file, self._tables)} ({end.file.link}) has a connection '
                                   'with data that nobody has accepted', 'try again when the program has accepted it, '
                                   'or use --kill: only accept(2) reaches the data')

    def _has_unread(self, pending: Sequence[int]) -> bool:
        """Whether any of these connections, which nobody has accepted, has data. That of a closed client may have."""
        clients = [self._tables.unix_sockets.get(inode) for inode in pending]
        return not all(client and not client.unsent for client in clients)

    def discover(self, file: OpenFile) -> Sequence[int]:
        return [fd for message in self._queue(file) for fd in message.fds]

    def peek_offset(self, file: OpenFile) -> int | None:
        return None if file.severed or self._is_listening(file) else offset_to_restore(file)

    def close(self) -> None:
        while self._queues:
            unix_queue.close_fds(self._queues.popitem()[1])

    def _queue(self, file: OpenFile) -> list[unix_queue.Queued]:
        """Return the queue of a socket, which is read once."""
        inode, own = file.stat.st_ino, self._own(file)
        # without a connection, recv(2) of a seqpacket socket fails (net/unix/af_unix.c, unix_seqpacket_recvmsg)
        if file.severed or (own and own.state != unix.SS_ESTABLISHED and own.type != socket.SOCK_DGRAM):
            return []
        if inode not in self._queues:
            self._queues[inode] = read_queue(file)
        return self._queues[inode]

    def _own(self, file: OpenFile) -> UnixSocket | None:
        return self._tables.unix_sockets.get(file.stat.st_ino)

    def _is_listening(self, file: OpenFile) -> bool:
        own = self._own(file)
        return own is not None and own.state == unix.SS_LISTEN

    def _listener_of(self, own: UnixSocket) -> UnixSocket | None:
        """Return the listener that has not accepted this client yet."""
        if own.state != unix.SS_ESTABLISHED or own.peer:
            return None
        return next((one for one in self._tables.unix_sockets.values() if own.inode in one.pending), None)

    def dump(self, file: OpenFile, content: Content) -> UnixSocketEnd:
        own, of = self._own(file), file.stat
        with file.as_socket() as sock:
            if file.severed or own is None:
                return UnixSocketEnd(of.st_ino, sock.type, 0, 1, 0, NOBODY, (), of.st_uid, of.st_gid, (), ())
            options, attached = dump_options(sock), dump_filter(sock)
            maker, groups = unix.peer_credentials(sock), unix.peer_groups(sock)
            name, peer_name = dump_name(own, sock, file.tid, self._tables), self._peer_name(own, sock, file.tid)
        peer = self._known.get(own.peer)
        queued = self._queue(file)
        addresses = tuple(message.address for message in queued) if own.type == socket.SOCK_DGRAM else ()
        action = self._action(own)
        if action == 'reconnect':
            return self._reconnected(file, own, name, peer_name, options, attached, content)
        joined = 0 if action else self._joined(own, maker)
        is_listening = own.state == unix.SS_LISTEN
        waiting = [inode for inode in own.pending if inode and (own.inode, inode) not in self._outside]
        return UnixSocketEnd(
            own.inode, own.type, 0 if action else own.peer, own.state == unix.SS_ESTABLISHED and own.has_peer,
            own.shutdown, dump_sender(maker, content), groups, of.st_uid, of.st_gid, options,
            tuple(dump_message(message, content) for message in queued), attached, name, peer_name,
            dump_sender(peer.maker, content) if peer else NOBODY, peer.groups if peer else (),
            0 if joined else self._accepted(own, name, peer_name), joined, is_listening,
            own.unsent if is_listening else 0, tuple(self._waiting(inode, content) for inode in waiting),
            self._listener_of(own) is not None and not action, addresses=addresses if any(addresses) else ())

    def inherited(self, file: OpenFile) -> str:
        own = self._own(file)
        if file.severed or own is None or self._action(own) != 'inherit':
            return ''
        return what_of(own, self._listener_of(own) or self._tables.unix_sockets.get(own.peer)) or ANY

    def take(self, record: UnixSocketEnd, file: OpenFile, content: Content) -> UnixSocketEnd:
        own = self._own(file)
        if not record.listening or own is None or not self._has_unread(own.pending):
            return record
        known = {client.inode: client for client in record.waiting}
        with file.duplicate() as fd:
            clients = list(take_clients(fd, own.pending, known, content))
        return replace(record, waiting=tuple(client for inode, client in zip(own.pending, clients, strict=False)
                                             if (own.inode, inode) not in self._outside))

    def _action(self, own: UnixSocket) -> Action | None:
        """Return what becomes of the connection if the other end is outside of the tree, else None."""
        listener = self._listener_of(own)
        return self._outside.get((own.inode, listener.inode if listener else own.peer))

    def _reconnected(self, file: OpenFile, own: UnixSocket, name: SocketName, peer_name: SocketName,
                     options: tuple[SocketOption, ...], attached: SocketFilter, content: Content) -> UnixSocketEnd:
        """Make the record of a client that a restart connects to its server outside of the tree again."""
        client = self._waiting(own.inode, content)
        return UnixSocketEnd(own.inode, own.type, 0, 1, own.shutdown, NOBODY, (), file.stat.st_uid, file.stat.st_gid,
                             options, (), attached, name, peer_name, client.maker, client.groups, outside=1,
                             identifier=read_status(file.pid).name)

    def _peer_name(self, own: UnixSocket, sock: socket.socket, tid: int) -> SocketName:
        """Return the name of the other end. One that is gone has no file any more."""
        if peer := self._tables.unix_sockets.get(own.peer):
            known = self._known.get(own.peer)
            if known is None:
                return dump_name(peer, None, tid, self._tables)
            with known.file.as_socket() as other:
                return dump_name(peer, other, tid, self._tables)
        name = unix.peer_name(sock) if own.has_peer else b''
        return SocketName(name, '', 0, 0, 0, 0, 0, 1) if name else NO_NAME

    def _joined(self, own: UnixSocket, maker: unix.SocketCredentials) -> int:
        """See UnixSocketEnd.joined. A datagram socket of a socketpair(2) is the only one with a maker."""
        peer = self._tables.unix_sockets.get(own.peer)
        if own.type != socket.SOCK_DGRAM or peer is None:
            return 0
        if peer.peer != own.inode:
            return ONE_WAY
        return BOTH_WAYS if maker.uid == NOBODY.uid else 0

    def _accepted(self, own: UnixSocket, name: SocketName, peer_name: SocketName) -> int:
        """See UnixSocketEnd.accepted. If both ends have a name, the accepted one shares it with a listener."""
        if own.state != unix.SS_ESTABLISHED or own.type == socket.SOCK_DGRAM or not (name.name or peer_name.name):
            return 0
        if not name.name or not peer_name.name:
            return THIS_END if name.name else OTHER_END
        peer = self._tables.unix_sockets.get(own.peer, own)
        listeners = {(one.name, one.file) for one in self._tables.unix_sockets.values() if one.state == unix.SS_LISTEN}
        if peer is own:         # the other end is gone, and only its name is known
            return OTHER_END if peer_name.name in {one for one, _ in listeners} else THIS_END
        if (own.name, own.file) in listeners or (peer.name, peer.file) in listeners:
            return THIS_END if (own.name, own.file) in listeners else OTHER_END
        return THIS_END if own.inode < own.peer else OTHER_END

    def _waiting(self, inode: int, content: Content) -> WaitingClient:
        """Return a client that waits to be accepted. The process that connected it is unknown until then."""
        own, file = self._tables.unix_sockets[inode], self._known[inode].file
        status = read_status(file.pid)
        with file.as_socket() as sock:
            return WaitingClient(inode, dump_name(own, sock, file.tid, self._tables),
                                 Sender(content.vpid(file.pid), status.uids[1], status.gids[1]), status.groups, ())

    # ------------------------------------------------------------ restart

    def references(self, record: UnixSocketEnd) -> Iterator[int]:
        for message in record.queue:
            yield from message.files

    def restart_findings(self, record: UnixSocketEnd, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        found = socket_findings(saved.link, record.uid, record.gid, lookup)
        if record.peer or not record.connected:
            found += name_findings(record.name, record.type, saved.link, lookup, self._tables)
        if record.outside:
            found += reconnect_findings(record, saved.link, lookup, self._tables)
        makes = record.listening or record.connected
        if makes and record.maker != NOBODY and not record.maker.vpid:
            found.append(finding('ESRCH', f'{saved.link} was made by a process outside of the tree',
                                 'its SO_PEERCRED will name another process', 'warning'))
        elif record.maker.vpid and lookup.uid and record.maker.uid != lookup.uid:
            found.append(finding('EPERM', f'{saved.link} was made by a process of uid {record.maker.uid}',
                                 f'its SO_PEERCRED names uid {lookup.uid} afterwards: restore it as root', 'warning'))
        senders = {sender for message in record.queue for sender in message.senders}
        if senders and os.geteuid():        # only CAP_SYS_ADMIN may name another process, unix(7)
            found.append(finding('EPERM', f'messages wait in {saved.link} with the credentials of their senders',
                                 'only root can send them again: restore as root'))
        if any(not sender.vpid for sender in senders):
            found.append(finding('ESRCH', f'the queue of {saved.link} has a message from a process outside of the tree',
                                 'its credentials will name no process', 'warning'))
        return found

    def late(self, record: UnixSocketEnd, saved: SavedFile) -> bool:
        if record.waits or record.joined or record.outside:
            return False
        return bool(record.connected and (record.maker.vpid or record.peer_maker.vpid))

    def create(self, record: UnixSocketEnd, saved: SavedFile, ctx: RestoreContext) -> int:
        fd = os.dup(make_socket(record, ctx))
        try:
            with socket.socket(fileno=os.dup(fd)) as sock:
                set_options(sock, record.options, saved.link)
            set_owner(fd, saved.mode, record.uid, record.gid, ctx)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def opened(self, record: UnixSocketEnd, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.outside:
            reconnect(record, fd, ctx)
        if record.listening:        # connections that were accepted are made before, and change what listen(2) sets
            listen(fd, record.backlog, record.maker, record.groups, ctx)
            connect_waiting(record, saved, ctx)

    def connect(self, record: UnixSocketEnd, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.queue:
            fill(record, saved, ctx)
        with socket.socket(fileno=os.dup(fd)) as sock:
            set_filter(sock, record.filter, saved.link)
        if record.joined == ONE_WAY:
            connect_to(fd, record.peer_name, record.type, ctx)

    def commit(self, record: UnixSocketEnd, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.joined == BOTH_WAYS:      # from then on no other socket may be connected to it (unix_may_send)
            connect_to(fd, record.peer_name, record.type, ctx)
        if not record.connected or record.peer or record.waits or record.outside:
            with socket.socket(fileno=os.dup(fd)) as sock:
                how = {unix.RCV_SHUTDOWN: socket.SHUT_RD, unix.SEND_SHUTDOWN: socket.SHUT_WR,
                       unix.RCV_SHUTDOWN | unix.SEND_SHUTDOWN: socket.SHUT_RDWR}.get(record.shutdown)
                if how is not None:
                    sock.shutdown(how)

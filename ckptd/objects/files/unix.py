# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unix socket without a name (unix(7)): connected to another one of the tree, disconnected from one that is gone, or
fresh.

sock_diag(7) shows the inode of the peer, so both ends are found wherever they are: in an fd table, or in flight in the
queue of a third socket. A queue is read with MSG_PEEK, message by message, and the other end sends it again.

A restart makes each connection once, by the process that SO_PEERCRED names to its ends. Files in flight are files of
the image like others. The queues are filled when all of them are open, so a socket may be in flight in itself.

The connection to the bus of a program that checkpoints itself is disconnected: after a restart it reads end-of-file.
"""

import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence

from ckptd.errors import CkptError, Finding, Refused
from ckptd.faults import fault
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel import unix, unix_queue
from ckptd.kernel.netlink import UnixSocket
from ckptd.kernel.sockopt import SO_BUF_LOCK, SO_PEEK_OFF
from ckptd.objects.files.base import Content, Endpoint, FileEnd, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.content import owner_findings, set_owner
from ckptd.objects.files.options import SocketOption, buffer_locks, dump_options, set_buffer, set_options
from ckptd.objects.files.socket_filter import NO_FILTER, SocketFilter, dump_filter, filter_findings, set_filter
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.unsupported import describe
from ckptd.objects.support import Support

_UCRED = struct.Struct('=3I')
_NO_ID = (1 << 32) - 1
_OVERHEAD = 4096        # bytes that the kernel charges for a message, above its data
_HINT = 'close it before the checkpoint, or checkpoint a tree that has both ends'


@layout
class Sender(Struct):
    """A process, with the ids that it had. vpid: 0 for one outside of the tree."""
    vpid: U32
    uid: U32
    gid: U32


_NOBODY = Sender(0, _NO_ID, _NO_ID)     # SO_PEERCRED of a socket that was never connected


@layout
class UnixMessage(Struct):
    """A message of a receive queue."""
    data: tuple[Extent, ...]        # none for an empty datagram
    files: tuple[U32, ...]          # ids of attached open files
    senders: tuple[Sender, ...]     # one, if the receiver asks for credentials
    urgent: U8                      # the byte of MSG_OOB


@layout
class UnixSocketEnd(Struct):
    """One end of a connection, or a socket that has none."""
    inode: U64
    type: U32
    peer: U64                       # inode of the other end, 0 for none
    connected: U8                   # with peer 0: the other end is gone
    shutdown: U8                    # RCV_SHUTDOWN and SEND_SHUTDOWN of <net/sock.h>
    maker: Sender                   # SO_PEERCRED
    groups: tuple[U32, ...]         # SO_PEERGROUPS
    uid: U32                        # of the socket itself (fchown(2))
    gid: U32                        # likewise
    options: tuple[SocketOption, ...]
    queue: tuple[UnixMessage, ...]
    filter: SocketFilter = NO_FILTER


class UnixKind(Kind[UnixSocketEnd], tag='unix'):
    support = Support('unix sockets without a name, with unread messages and files in flight',
                      refused='sockets that are connected to a process outside of the tree',
                      user='messages with credentials of their senders are refused')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._queues: dict[int, list[unix_queue.Queued]] = {}     # by inode, each read once

    def matches(self, file: OpenFile) -> bool:
        if not stat.S_ISSOCK(file.stat.st_mode) or file.is_path:
            return False
        if file.severed:
            return True
        own = self._tables.unix_sockets.get(file.stat.st_ino)
        if own is None or own.name or own.state not in (unix.SS_ESTABLISHED, unix.SS_UNCONNECTED):
            return False
        if own.state == unix.SS_ESTABLISHED and not own.peer:
            with file.as_socket() as sock:
                return unix.other_end_gone(sock, own)       # otherwise it waits to be accepted
        peer = self._tables.unix_sockets.get(own.peer)
        # a datagram socket may be connected to one that is not connected to it; that one has a name
        return peer is None or not peer.name

    def findings(self, file: OpenFile) -> list[Finding]:
        if file.severed:
            return [finding('EPIPE', f'{file.link} is a connection to the bus', 'after a restart it reads end-of-file',
                            'warning')]
        with file.as_socket() as sock:
            if unix.has_error(sock):
                return [finding('EIO', f'{file.link} has a pending error, which reading would consume',
                                'let the program read it (SO_ERROR) before the checkpoint')]
            return filter_findings(sock, f'{describe(file, self._tables)} ({file.link})')

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        own = self._own(file)
        if file.severed or own is None or not own.peer:
            return None
        low, high = sorted((own.inode, own.peer))
        return Endpoint(('unix', low, high), frozenset({str(own.inode)}), frozenset({str(own.peer)}))

    def link(self, ends: Sequence[FileEnd], *, is_whole: bool) -> Iterator[tuple[FileEnd, Finding]]:
        held = {name for end in ends for name in end.endpoint.holds}
        lacking = [end for end in ends if not end.endpoint.lacks <= held]
        holders = unix.find_holders({int(peer) for end in lacking for peer in end.endpoint.lacks})
        for end in lacking:
            [peer] = end.endpoint.lacks
            holder = holders.get(int(peer))
            if holder is None and not is_whole:
                continue        # it may be in flight within the tree, which is checked when the tree is at rest
            where = f'{holder.comm}[{holder.pid}]' if holder else 'a process'
            yield end, finding('EOPNOTSUPP', f'{describe(end.file, self._tables)} ({end.file.link}) is connected to '
                               f'{where}, outside of the tree', _HINT)

    def discover(self, file: OpenFile) -> Sequence[int]:
        return [fd for message in self._queue(file) for fd in message.fds]

    def peek_offset(self, file: OpenFile) -> int | None:
        if file.severed:
            return None
        with file.as_socket() as sock:
            if unix.has_error(sock) or unix.is_empty(sock):
                return None
            return unix_queue.peek_offset(sock)

    def close(self) -> None:
        while self._queues:
            unix_queue.close_fds(self._queues.popitem()[1])

    def _queue(self, file: OpenFile) -> list[unix_queue.Queued]:
        """Return the queue of a socket, which is read once."""
        inode = file.stat.st_ino
        if file.severed:
            return []
        if inode not in self._queues:
            with file.as_socket() as sock:
                before = unix_queue.peek_offset(sock)
                try:
                    is_empty = unix.has_error(sock) or unix.is_empty(sock)
                    self._queues[inode] = [] if is_empty else unix_queue.walk_queue(sock)
                    fault('queue-walked')
                except unix_queue.MessagePassedOver as error:
                    raise CkptError(f'{file.link} of process {file.pid}: an empty message waits in it that an earlier '
                                    'checkpoint has marked', errno=error.errno, task=file.pid,
                                    resource=f'fd {file.fd}',
                                    hint='try again when the program has received it') from error
                finally:
                    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)
        return self._queues[inode]

    def _own(self, file: OpenFile) -> UnixSocket | None:
        return self._tables.unix_sockets.get(file.stat.st_ino)

    def dump(self, file: OpenFile, content: Content) -> UnixSocketEnd:
        own, of = self._own(file), file.stat
        with file.as_socket() as sock:
            if file.severed or own is None:
                return UnixSocketEnd(of.st_ino, sock.type, 0, 1, 0, _NOBODY, (), of.st_uid, of.st_gid, (), ())
            options, attached = dump_options(sock), dump_filter(sock)
            maker, groups = unix.peer_credentials(sock), unix.peer_groups(sock)
        queue = tuple(self._message(file, message, content) for message in self._queue(file))
        return UnixSocketEnd(own.inode, own.type, own.peer, own.state == unix.SS_ESTABLISHED, own.shutdown,
                             _sender(maker, content), groups, of.st_uid, of.st_gid, options, queue, attached)

    def _message(self, file: OpenFile, message: unix_queue.Queued, content: Content) -> UnixMessage:
        if message.address:
            raise Refused(f'the queue of {file.link} has a datagram from a socket with a name', errno=errno.EOPNOTSUPP,
                          task=file.pid, resource=f'fd {file.fd}', hint='receive it before the checkpoint')
        return UnixMessage((content.add([message.data]),) if message.data else (),
                           tuple(content.file_id(fd) for fd in message.fds),
                           (_sender(message.sender, content),) if message.sender else (), message.urgent)

    # ------------------------------------------------------------ restart

    def references(self, record: UnixSocketEnd) -> Iterator[int]:
        for message in record.queue:
            yield from message.files

    def restart_findings(self, record: UnixSocketEnd, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        found = owner_findings(saved.link, record.uid, record.gid, lookup)
        if record.connected and record.maker != _NOBODY and not record.maker.vpid:
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
        return bool(record.connected and record.maker.vpid)

    def create(self, record: UnixSocketEnd, saved: SavedFile, ctx: RestoreContext) -> int:
        fd = os.dup(self._end(record, ctx))
        try:
            with socket.socket(fileno=os.dup(fd)) as sock:
                set_options(sock, record.options, saved.link)
            set_owner(fd, saved.mode, record.uid, record.gid, ctx)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _end(self, record: UnixSocketEnd, ctx: RestoreContext) -> int:
        if not record.connected:
            return ctx.once(('unix', record.inode), lambda: _fresh(record.type))
        other = record.peer or -record.inode

        def make() -> int:
            mine, theirs = self._pair(record, ctx)
            ctx.once(('unix', record.inode), lambda: mine)
            ctx.once(('unix', other), lambda: theirs)
            return _fresh(record.type)      # a fresh one, as the ends of the pair are already used
        ctx.once(('unix pair', *sorted((record.inode, other))), make)
        return ctx.once(('unix', record.inode), _lost)

    def _pair(self, record: UnixSocketEnd, ctx: RestoreContext) -> tuple[int, int]:
        maker = record.maker
        if ctx.pid(maker.vpid):
            return ctx.socketpair(record.type, maker.vpid, maker.uid, maker.gid, record.groups)
        mine, theirs = socket.socketpair(socket.AF_UNIX, record.type)
        return mine.detach(), theirs.detach()

    def connect(self, record: UnixSocketEnd, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.queue:
            self._fill(record, saved, ctx)
        with socket.socket(fileno=os.dup(fd)) as sock:
            set_filter(sock, record.filter, saved.link)

    def _fill(self, record: UnixSocketEnd, saved: SavedFile, ctx: RestoreContext) -> None:
        other = ctx.once(('unix', record.peer or -record.inode), _lost)
        with socket.socket(fileno=os.dup(other)) as sock:
            size, locks = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), buffer_locks(sock)
            needed = sum(extent.length for message in record.queue for extent in message.data)
            set_buffer(sock, socket.SO_SNDBUF, max(size, 2 * needed + _OVERHEAD * len(record.queue)))
            for message in record.queue:
                self._send(sock, message, saved, ctx)
            set_buffer(sock, socket.SO_SNDBUF, size)
            sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locks)

    def _send(self, sock: socket.socket, message: UnixMessage, saved: SavedFile, ctx: RestoreContext) -> None:
        data = b''.join(ctx.pread(extent, extent.length, 0) for extent in message.data)
        control: list[tuple[int, int, bytes]] = []
        if message.files:
            fds = [ctx.fd_of(file_id) for file_id in message.files]
            control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f'={len(fds)}i', *fds)))
        for sender in message.senders:
            if pid := ctx.pid(sender.vpid):
                control.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, _UCRED.pack(pid, sender.uid, sender.gid)))
        flags = socket.MSG_DONTWAIT | (socket.MSG_OOB if message.urgent else 0)
        try:
            done = sock.sendmsg([data], control, flags)
        except OSError as error:
            raise _not_sent(saved, len(data), error) from error
        if done != len(data):
            raise _not_sent(saved, len(data), None)

    def commit(self, record: UnixSocketEnd, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if record.connected and record.peer:
            with socket.socket(fileno=os.dup(fd)) as sock:
                how = {unix.RCV_SHUTDOWN: socket.SHUT_RD, unix.SEND_SHUTDOWN: socket.SHUT_WR,
                       unix.RCV_SHUTDOWN | unix.SEND_SHUTDOWN: socket.SHUT_RDWR}.get(record.shutdown)
                if how is not None:
                    sock.shutdown(how)


def _sender(credentials: unix.SocketCredentials, content: Content) -> Sender:
    return Sender(content.vpid(credentials.pid), credentials.uid, credentials.gid)


def _fresh(kind: int) -> int:
    return socket.socket(socket.AF_UNIX, kind).detach()


def _lost() -> int:
    raise CkptError('the other end of a connection was not made', errno=errno.ENOTCONN)


def _not_sent(saved: SavedFile, size: int, error: OSError | None) -> CkptError:
    if isinstance(error, PermissionError):
        return CkptError(f'{saved.link}: a message cannot be sent again in the name of its sender', errno=errno.EPERM,
                         resource=saved.link, hint='restore it as root')
    if error is None or isinstance(error, BlockingIOError):
        return CkptError(f'{saved.link}: a message of {size:,} bytes does not fit into the socket', errno=errno.ENOBUFS,
                         resource=saved.link, hint='raise the sysctl net.core.wmem_max, or restore as root')
    return CkptError(f'{saved.link}: a message cannot be sent again: {error.strerror}', errno=error.errno,
                     resource=saved.link)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets in a restart: their connections, made by the processes that SO_PEERCRED names, and their queues."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ckptd.errors import CkptError
from ckptd.image.records import SavedFile
from ckptd.kernel import unix_queue
from ckptd.kernel.unix import encode_address, peer_credentials, peer_groups
from ckptd.objects.files.base import Content, Maker, RestoreContext
from ckptd.objects.files.unix.messages import NOBODY, Sender, dump_message, dump_sender, send_all
from ckptd.objects.files.unix.names import (
    NO_NAME,
    SocketName,
    bind_again,
    bound_socket,
    connect_to,
    file_of,
    sender_named,
)
from ckptd.objects.files.unix.record import THIS_END, UnixSocketEnd, WaitingClient

Ids = tuple[Sender, Sequence[int]]      # a process, and its groups
_SOME = 64      # a backlog, while a restart accepts its own connections


def make_socket(record: UnixSocketEnd, ctx: RestoreContext) -> int:
    """Make a socket with its name and, if it needs tasks only to be made, its connection. Return it as `once` does."""
    if not record.connected or record.joined or record.waits or record.outside:
        return _unconnected(record.inode, record.name, record.type, ctx)
    other = record.peer or -record.inode

    def make() -> int:
        mine, theirs = _connection(record, ctx)
        ctx.once(('unix', record.inode), lambda: mine)
        ctx.once(('unix', other), lambda: theirs)
        return _fresh(record.type)      # a fresh one, as the ends of the pair are already used
    ctx.once(('unix pair', *sorted((record.inode, other))), make)
    return ctx.once(('unix', record.inode), _lost)


def _connection(record: UnixSocketEnd, ctx: RestoreContext) -> tuple[int, int]:
    """Make both ends of a connection: this one and the other one."""
    if not record.accepted:
        return _pair(record, ctx)
    mine, theirs = (record.maker, record.groups), (record.peer_maker, record.peer_groups)
    if record.accepted == THIS_END:
        # a client's SO_PEERCRED tells of listen(2), that of the accepted socket tells of connect(2)
        accepted, client = _accept(record.type, record.name, record.peer_name, theirs, mine, ctx)
        return accepted, client
    try:
        accepted, client = _accept(record.type, record.peer_name, record.name, mine, theirs, ctx)
    except CkptError:
        if record.peer:
            raise
        return _pair(record, ctx)       # only getpeername(2) tells the name of an end that is gone
    return client, accepted


def _pair(record: UnixSocketEnd, ctx: RestoreContext) -> tuple[int, int]:
    maker = record.maker
    if ctx.pid(maker.vpid):
        mine, theirs = ctx.socketpair(record.type, Maker(maker.vpid, maker.uid, maker.gid, record.groups))
    else:
        ends = socket.socketpair(socket.AF_UNIX, record.type)
        mine, theirs = ends[0].detach(), ends[1].detach()
    try:
        for fd, name in ((mine, record.name), (theirs, record.peer_name)):
            if name.name and (record.peer or fd == mine):       # nobody can look at an end that is gone
                bind_again(fd, name, record.type, ctx)
    except BaseException:
        os.close(mine)
        os.close(theirs)
        raise
    return mine, theirs


def _accept(kind: int, name: SocketName, client_name: SocketName, listener: Ids, connector: Ids,
            ctx: RestoreContext) -> tuple[int, int]:
    """Make a connection by listen(2), connect(2) and accept(2). Return the accepted end and the client's end.

    name: of the accepted end, which it has from its listener. listener, connector: the processes that the two ends
    name. Another process may connect to the listener at the same moment, and is rejected.
    """
    server = bound_socket(name, kind, ctx)
    listen(server, _SOME, *listener, ctx)
    client = os.dup(bound_socket(client_name, kind, ctx)) if client_name.name else _fresh(kind)
    try:
        return _accept_from(server, _connect(client, name, kind, connector, ctx)), client
    except BaseException:
        os.close(client)
        raise


def _accept_from(server: int, pid: int) -> int:
    with socket.socket(fileno=os.dup(server)) as listener, not_blocking(server):
        while True:
            accepted, _ = listener.accept()
            if peer_credentials(accepted).pid == pid:
                return accepted.detach()
            accepted.close()


@contextmanager
def not_blocking(fd: int) -> Iterator[None]:
    """Set O_NONBLOCK in this block. All fds of the description have it."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def listen(fd: int, backlog: int, maker: Sender, groups: Sequence[int], ctx: RestoreContext) -> None:
    """Let a socket listen in the name of its maker, or in ours if that is not in the tree."""
    if ctx.pid(maker.vpid):
        ctx.listen(fd, backlog, Maker(maker.vpid, maker.uid, maker.gid, groups))
        return
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.listen(backlog)


def take_clients(fd: int, pending: Sequence[int], known: Mapping[int, WaitingClient],
                 content: Content) -> Iterator[WaitingClient]:
    """Accept the connections of a listener that is about to be killed, and yield their clients with what they have
    sent. pending: inodes of the clients, in their order. CkptError for files in flight, which cannot be kept."""
    with socket.socket(fileno=os.dup(fd)) as listener, not_blocking(fd):
        for inode in pending:
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                return
            with accepted:
                client = known.get(inode) or WaitingClient(0, NO_NAME, NOBODY, (), ())
                queued = unix_queue.walk_queue(accepted)
                if any(message.fds for message in queued):
                    unix_queue.close_fds(queued)
                    raise CkptError('a connection that nobody has accepted has files in flight, and was lost',
                                    errno=errno.EOPNOTSUPP, hint='try again when the program has accepted all')
                yield replace(client, maker=dump_sender(peer_credentials(accepted), content),
                              groups=peer_groups(accepted),
                              queue=tuple(dump_message(message, content) for message in queued))


def connect_waiting(record: UnixSocketEnd, saved: SavedFile, ctx: RestoreContext) -> None:
    """Connect the clients of a listener that nobody has accepted yet, in their order. They send again what they have
    sent."""
    for client in record.waiting:
        is_closed = not client.inode
        mine = _fresh(record.type) if is_closed else _unconnected(client.inode, client.name, record.type, ctx)
        try:
            with not_blocking(mine):
                _connect(mine, record.name, record.type, (client.maker, client.groups), ctx)
            if client.queue:
                send_all(mine, client.queue, saved, ctx)
        finally:
            if is_closed:
                os.close(mine)


def _unconnected(inode: int, name: SocketName, kind: int, ctx: RestoreContext) -> int:
    return bound_socket(name, kind, ctx) if name.name else ctx.once(('unix', inode), lambda: _fresh(kind))


def _connect(fd: int, to: SocketName, kind: int, connector: Ids, ctx: RestoreContext) -> int:
    """Connect a socket in the name of a process, or in ours if that is not in the tree. Return the pid of the one that
    has done it."""
    maker, groups = connector
    pid = ctx.pid(maker.vpid)
    if pid:
        ctx.connect_socket(fd, encode_address(to.name), file_of(to, kind, ctx),
                           Maker(maker.vpid, maker.uid, maker.gid, groups))
    else:
        connect_to(fd, to, kind, ctx)
    return pid or os.getpid()


def fill(record: UnixSocketEnd, saved: SavedFile, ctx: RestoreContext) -> None:
    """Send the messages of a queue again."""
    if record.type != socket.SOCK_DGRAM or (record.connected and not record.joined):
        send_all(ctx.once(('unix', record.peer or -record.inode), _lost), record.queue, saved, ctx)
        return
    at = file_of(record.name, record.type, ctx)
    to = record.name.name if at < 0 else f'/proc/self/fd/{at}'
    for number, message in enumerate(record.queue):
        name = record.addresses[number] if number < len(record.addresses) else b''
        sender = sender_named(name, ctx) if name else ctx.once(('unix sender',), lambda: _fresh(socket.SOCK_DGRAM))
        send_all(sender, (message,), saved, ctx, to)


def _fresh(kind: int) -> int:
    return socket.socket(socket.AF_UNIX, kind).detach()


def _lost() -> int:
    raise CkptError('the other end of a connection was not made', errno=errno.ENOTCONN)

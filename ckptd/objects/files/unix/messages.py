# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unread messages of a unix socket: as they are kept, and sent again."""

import errno
import os
import socket
import struct
from collections.abc import Sequence

from ckptd.errors import CkptError
from ckptd.image.grammar import U8, U32, Struct, layout
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel import unix, unix_queue
from ckptd.kernel.sockopt import SO_BUF_LOCK
from ckptd.objects.files.base import Content, RestoreContext
from ckptd.objects.files.options import buffer_locks, set_buffer

_UCRED = struct.Struct('=3I')
NO_ID = (1 << 32) - 1
_OVERHEAD = 4096        # bytes that the kernel charges for a message, above its data


@layout
class Sender(Struct):
    """A process, with the ids that it had. vpid: 0 for one outside of the tree."""
    vpid: U32
    uid: U32
    gid: U32


NOBODY = Sender(0, NO_ID, NO_ID)     # SO_PEERCRED of a socket that was never connected


@layout
class UnixMessage(Struct):
    """A message of a receive queue."""
    data: tuple[Extent, ...]        # none for an empty datagram
    files: tuple[U32, ...]          # ids of attached open files
    senders: tuple[Sender, ...]     # one, if the receiver asks for credentials
    urgent: U8                      # the byte of MSG_OOB


def dump_sender(credentials: unix.SocketCredentials, content: Content) -> Sender:
    return Sender(content.vpid(credentials.pid), credentials.uid, credentials.gid)


def dump_message(message: unix_queue.Queued, content: Content) -> UnixMessage:
    return UnixMessage((content.add([message.data]),) if message.data else (),
                       tuple(content.file_id(fd) for fd in message.fds),
                       (dump_sender(message.sender, content),) if message.sender else (), message.urgent)


def send_all(fd: int, queue: Sequence[UnixMessage], saved: SavedFile, ctx: RestoreContext,
             to: str | bytes = b'') -> None:
    """Send messages again from one socket. to: address of the receiver, if the socket is not connected to it."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        size, locks = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF), buffer_locks(sock)
        needed = sum(extent.length for message in queue for extent in message.data)
        set_buffer(sock, socket.SO_SNDBUF, max(size, 2 * needed + _OVERHEAD * len(queue)))
        for message in queue:
            _send(sock, message, saved, ctx, to)
        set_buffer(sock, socket.SO_SNDBUF, size)
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locks)


def _send(sock: socket.socket, message: UnixMessage, saved: SavedFile, ctx: RestoreContext, to: str | bytes) -> None:
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
        done = sock.sendmsg([data], control, flags, to) if to else sock.sendmsg([data], control, flags)
    except OSError as error:
        raise _not_sent(saved, len(data), error) from error
    if done != len(data):
        raise _not_sent(saved, len(data), None)


def _not_sent(saved: SavedFile, size: int, error: OSError | None) -> CkptError:
    if isinstance(error, PermissionError):
        return CkptError(f'{saved.link}: a message cannot be sent again in the name of its sender', errno=errno.EPERM,
                         resource=saved.link, hint='restore it as root')
    if error is None or isinstance(error, BlockingIOError):
        return CkptError(f'{saved.link}: a message of {size:,} bytes does not fit into the socket', errno=errno.ENOBUFS,
                         resource=saved.link, hint='raise the sysctls net.core.wmem_max and net.unix.max_dgram_qlen, '
                                                   'or restore as root')
    return CkptError(f'{saved.link}: a message cannot be sent again: {error.strerror}', errno=error.errno,
                     resource=saved.link)

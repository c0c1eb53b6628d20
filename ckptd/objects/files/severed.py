# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connected unix stream socket whose other end is gone, unix(7): what was sent to it can be read, then comes
end-of-file; what is written to it is EPIPE.

The Java runtime has one (sun.nio.ch: a socketpair(2) of which it closes one half, to put over sockets that it closes).
A connection to the bus becomes one when a program checkpoints itself: after a restart nobody is at the other end.
"""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckptd.errors import CkptError, Finding, Refused
from ckptd.image.grammar import U64, Struct, layout
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel import unix
from ckptd.objects.files.base import Content, Kind, OpenFile, RestoreContext, finding

PIECE = 64 << 10


@layout
class Disconnected(Struct):
    """inode: of the socket. data: unread bytes, in order; of a connection to the bus none."""
    inode: U64
    data: tuple[Extent, ...]


class DisconnectedKind(Kind[Disconnected], tag='severed'):

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISSOCK(file.stat.st_mode) and not file.is_path and (file.severed or _other_end_gone(file))

    def refusals(self, file: OpenFile) -> list[Finding]:
        if file.severed:
            return [finding('EPIPE', f'{file.link} is a connection to the bus', 'after a restart it reads end-of-file',
                            'warning')]
        with _socket(file) as sock:
            if unix.peek(sock)[1]:
                return [finding('EOPNOTSUPP', f'file descriptors wait in {file.link}, whose other end is gone',
                                'receive them (recvmsg(2)) before the checkpoint')]
        return []

    def dump(self, file: OpenFile, content: Content) -> Disconnected:
        if file.severed:
            return Disconnected(file.stat.st_ino, ())
        with _socket(file) as sock:
            data, has_fds = unix.peek(sock)
        if has_fds:
            raise Refused(f'file descriptors wait in {file.link}', errno=errno.EOPNOTSUPP, task=file.pid,
                          resource=f'fd {file.fd}')
        return Disconnected(file.stat.st_ino, (content.add([data]),) if data else ())

    def restore(self, record: Disconnected, saved: SavedFile, ctx: RestoreContext) -> int:
        mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with mine:
            with other:
                for extent in record.data:
                    _send(other, extent, saved.link, ctx)
            fcntl.fcntl(mine.fileno(), fcntl.F_SETFL, saved.flags & ~os.O_ASYNC)    # its owner comes later
            return mine.detach()


@contextmanager
def _socket(file: OpenFile) -> Iterator[socket.socket]:
    """The task's socket itself: only questions may be asked of it."""
    with file.duplicate() as fd, socket.socket(fileno=os.dup(fd)) as sock:
        yield sock


def _other_end_gone(file: OpenFile) -> bool:
    with _socket(file) as sock, suppress(OSError):      # no sock_diag
        return unix.is_stream(sock) and unix.can_peek(sock) and unix.other_end_gone(sock)
    return False


def _send(sock: socket.socket, extent: Extent, link: str, ctx: RestoreContext) -> None:
    sock.setblocking(False)     # nobody reads
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * extent.length)
    done = 0
    while done < extent.length:
        piece = ctx.pread(extent, min(PIECE, extent.length - done), done)
        try:
            done += sock.send(piece)
        except BlockingIOError:
            raise CkptError(f'{extent.length:,} bytes do not fit into a socket', errno=errno.ENOBUFS, resource=link,
                            hint='raise the sysctl net.core.wmem_max') from None

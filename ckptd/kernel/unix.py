# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix stream sockets, unix(7): what waits in one, whether anybody is at its other end. A look changes nothing."""

import array
import fcntl
import os
import select
import socket
import termios
from collections.abc import Mapping
from typing import Final

from ckptd.kernel.netlink import UnixSocket, unix_sockets

SS_ESTABLISHED: Final = 1       # <linux/tcp_states.h>, which unix sockets use as well
SO_PEEK_OFF: Final = 42         # <asm-generic/socket.h>
SCM_MAX_FD: Final = 253         # <net/scm.h>


def is_stream(sock: socket.socket) -> bool:
    return (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)


def other_end_gone(sock: socket.socket) -> bool:
    """It was connected, and its other end is closed. OSError where there is no sock_diag."""
    poll = select.poll()
    poll.register(sock, 0)      # poll(2): POLLHUP is told unasked
    if not any(events & select.POLLHUP for _, events in poll.poll(0)):
        return False
    # so does one that was never connected, and one whose other end is there and has shut both directions down
    own = unix_sockets().get(os.fstat(sock.fileno()).st_ino)
    return own is not None and own.state == SS_ESTABLISHED and not own.peer


def can_peek(sock: socket.socket) -> bool:
    """A look would not be felt: with SO_PEEK_OFF, the position for the next one moves."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) < 0


def peek(sock: socket.socket) -> tuple[bytes, bool]:
    """Unread bytes, and whether there are more than these because file descriptors are among them."""
    count = array.array('i', [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    if not count[0]:        # recvmsg(2) of an empty queue would take a pending error away
        return b'', False
    fds = array.array('i')
    data, control, _, _ = sock.recvmsg(count[0], socket.CMSG_SPACE(SCM_MAX_FD * fds.itemsize),
                                       socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    for level, kind, value in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(value)
    for fd in fds:
        os.close(fd)
    return data, bool(fds) or len(data) != count[0]     # a read ends where fds come along


def clients_beside(inode: int, sockets: Mapping[int, UnixSocket]) -> frozenset[int]:
    """Inodes of the stream sockets that are connected to what the socket `inode` is connected to, itself included.

    Of one that is not connected, or not to a name, none. The name alone is not enough: a path can be bound again.
    """
    own = sockets.get(inode)
    server = sockets.get(own.peer) if own else None
    if server is None or not server.name:
        return frozenset()
    return frozenset(
        one.inode for one in sockets.values() if one.type == socket.SOCK_STREAM and one.state == SS_ESTABLISHED
        and (peer := sockets.get(one.peer)) and (peer.name, peer.file) == (server.name, server.file))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unix sockets (unix(7)): their unread data, and the other end."""

import array
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from ckptd.kernel.decl import c_int, c_uint, c_void_p, libc
from ckptd.kernel.netlink import UnixSocket, unix_sockets
from ckptd.kernel.sockopt import SO_PEERGROUPS, read_option
from ckptd.kernel.status import read_status

# <linux/tcp_states.h>, which unix sockets use as well; TCP_CLOSE is a socket that is not connected
SS_ESTABLISHED: Final = 1
SS_UNCONNECTED: Final = 7
SS_LISTEN: Final = 10
RCV_SHUTDOWN, SEND_SHUTDOWN = 1, 2      # <net/sock.h>

SIOCUNIXFILE: Final = 0x89E0     # <linux/un.h>: SIOCPROTOPRIVATE

UCRED = struct.Struct('=3I')   # struct ucred of <linux/socket.h>
_GROUPS = 1 << 16               # NGROUPS_MAX of <linux/limits.h>
_FEW = 256                      # bytes, for the groups of most processes


class SocketCredentials(NamedTuple):
    """The sender of a message, or the maker of a connection. pid: in our pid namespace, 0 if it is not in it."""
    pid: int
    uid: int
    gid: int


def polls(sock: socket.socket, event: int) -> bool:
    """Whether poll(2) reports this event now."""
    poll = select.poll()
    poll.register(sock, event)
    return any(events & event for _, events in poll.poll(0))


def other_end_gone(sock: socket.socket, own: UnixSocket) -> bool:
    """Whether it was connected and its other end is closed. Otherwise the other end waits to be accepted. A datagram
    socket needs no accept(2)."""
    # POLLHUP also comes for a socket that was never connected, and for one that has shut down both directions
    return own.state == SS_ESTABLISHED and not own.peer and (
        sock.type == socket.SOCK_DGRAM or polls(sock, select.POLLHUP))


def has_error(sock: socket.socket) -> bool:
    """Whether a socket of any family has a pending error, or an entry in its error queue (IP_RECVERR). recv(2) would
    consume the error, even with MSG_PEEK."""
    return polls(sock, select.POLLERR)


def bytes_in(sock: socket.socket) -> int:
    """Return the unread bytes (FIONREAD); for datagrams, those of the first one."""
    count = array.array('i', [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]


def is_empty(sock: socket.socket) -> bool:
    """Whether there is nothing to receive."""
    if sock.type == socket.SOCK_STREAM:
        return not bytes_in(sock)      # at end-of-file a stream polls as readable
    return not polls(sock, select.POLLRDNORM)


def peer_credentials(sock: socket.socket) -> SocketCredentials:
    """Return SO_PEERCRED. The pid is 0 if the process is not in our pid namespace, or there is no peer."""
    return SocketCredentials(*UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)))


def peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """Return SO_PEERGROUPS: supplementary groups of the process that SO_PEERCRED names."""
    for size in (_FEW, 4 * _GROUPS):
        try:
            data = read_option(sock, SO_PEERGROUPS, size)
        except OSError as error:
            if error.errno == errno.ERANGE:
                continue
            if error.errno == errno.ENODATA:        # there is no peer
                break
            raise
        return struct.unpack(f'={len(data) // 4}I', data)
    return ()


def peer_name(sock: socket.socket) -> bytes:
    """Return the name of the other end, also when that is closed; b'' for none."""
    with suppress(OSError):
        name = sock.getpeername()
        return name if isinstance(name, bytes) else os.fsencode(name or '')
    return b''


class Holder(NamedTuple):
    """A process that has a socket open."""
    pid: int
    comm: str


def find_holders(inodes: Collection[int]) -> dict[int, Holder]:
    """Find a process for each of these sockets that has an fd of it. Sockets of processes that we may not inspect are
    left out."""
    wanted = {f'socket:[{inode}]': inode for inode in inodes}
    found: dict[int, Holder] = {}
    for process in Path('/proc').glob('[0-9]*') if wanted else ():
        with suppress(OSError):
            held = {wanted[link] for fd in (process / 'fd').iterdir() if (link := str(fd.readlink())) in wanted}
            holder = Holder(int(process.name), read_status(int(process.name)).name) if held - found.keys() else None
            found |= {inode: holder for inode in held - found.keys() if holder}
    return found


@libc
def _bind(sockfd: c_int, addr: c_void_p, addrlen: c_uint) -> c_int: ...


def encode_address(name: bytes) -> bytes:
    """Return the struct sockaddr_un of a name (unix(7)): a path, or an abstract name with its leading NUL."""
    return struct.pack('=H', socket.AF_UNIX) + name + (b'' if name.startswith(b'\0') else b'\0')


def bind_name(fd: int, name: bytes) -> None:
    """Bind a socket. OSError. The method of the module socket rejects a path of 108 bytes."""
    address = encode_address(name)
    _bind(fd, ctypes.create_string_buffer(address, len(address)), min(len(address), 110))


def open_bound(sock: socket.socket) -> int:
    """Open the file that a socket is bound to, with O_PATH, wherever its name is. OSError: this requires CAP_NET_ADMIN
    and a path."""
    return fcntl.ioctl(sock, SIOCUNIXFILE)


def is_dead(path: str) -> bool:
    """Whether no socket is bound to the file of a unix socket any more. OSError if we may not write it, or there is
    none.

    A connection by the wrong type of socket reaches no listener: EPROTOTYPE. The kernel looks for the socket before it
    compares the types (net/unix/af_unix.c, unix_find_bsd).
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno in (errno.EPROTOTYPE, errno.EPERM):
                return False
            if error.errno == errno.ECONNREFUSED:
                return True
            raise
    return False


def clients_beside(inode: int, sockets: Mapping[int, UnixSocket]) -> frozenset[int]:
    """Return the inodes of the stream sockets that are connected to the same listener as the socket `inode`, itself
    included.

    Empty if it is not connected, or not connected to a name. The name alone is not enough, because a path can be bound
    again.
    """
    own = sockets.get(inode)
    server = sockets.get(own.peer) if own else None
    if server is None or not server.name:
        return frozenset()
    return frozenset(
        one.inode for one in sockets.values() if one.type == socket.SOCK_STREAM and one.state == SS_ESTABLISHED
        and (peer := sockets.get(one.peer)) and (peer.name, peer.file) == (server.name, server.file))


def sockets_by_inode() -> Mapping[int, UnixSocket]:
    """Return all unix sockets of our network namespace; none without sock_diag."""
    with suppress(OSError):
        return unix_sockets()
    return {}

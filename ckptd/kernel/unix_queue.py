# SPDX-License-Identifier: LGPL-2.1-or-later
"""The receive queue of a unix or UDP socket, read with MSG_PEEK: its messages, with their borders, files and
senders."""

import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from ckptd.kernel.inet import Address, address_of
from ckptd.kernel.memory import PAGE, mprotect
from ckptd.kernel.pidfd import pidfd_pid
from ckptd.kernel.sockopt import SO_PEEK_OFF
from ckptd.kernel.status import read_status
from ckptd.kernel.unix import UCRED, SocketCredentials, bytes_in, has_error, polls

SCM_PIDFD: Final = 4            # <linux/socket.h>
SCM_MAX_FD: Final = 253         # <net/scm.h>
SIOCATMARK: Final = 0x8905      # <asm-generic/sockios.h>

_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_CONTROL = socket.CMSG_SPACE(4 * SCM_MAX_FD) + 8192     # fds, credentials, a pidfd, a security label
_LONGEST = 1 << 20              # bytes of one peek


class MessagePassedOver(OSError):
    """The receive queue has a message that no walk can reach."""


class Queued(NamedTuple):
    """One message of a receive queue; for a stream, the bytes up to the next border."""
    data: bytes
    fds: tuple[int, ...] = ()                   # our duplicates of the attached files; the caller closes them
    sender: SocketCredentials | None = None           # None if the receiver has not requested it (SO_PASSCRED)
    urgent: bool = False                        # the one byte of send(2) with MSG_OOB
    address: bytes = b''                        # of a datagram: the name that its sender is bound to
    sender_address: Address | None = None       # likewise, of an internet socket


def walk_queue(sock: socket.socket) -> list[Queued]:
    """Return every message of the receive queue without taking any out. The caller closes the fds.

    This sets SO_PEEK_OFF and leaves it set: the caller must restore the old value in any case. MessagePassedOver if the
    walk has missed one.
    """
    found = _walk(sock)
    if sock.type != socket.SOCK_STREAM and _has_passed_over(sock, found):
        close_fds(found)
        raise MessagePassedOver(errno.EAGAIN, 'an empty message that was peeked at before is in front of others')
    return found


def _walk(sock: socket.socket) -> list[Queued]:
    found: list[Queued] = []
    try:
        if sock.type == socket.SOCK_STREAM:
            _walk_stream(sock, found)
        else:
            _walk_datagrams(sock, found)
    except BaseException:
        close_fds(found)
        raise
    return found


def close_fds(queue: list[Queued]) -> None:
    for one in queue:
        for fd in one.fds:
            os.close(fd)


def _walk_datagrams(sock: socket.socket, found: list[Queued]) -> None:
    """Walk datagrams or packets."""
    # at end-of-file recvmsg(2) returns nothing for ever
    ends = sock.type == socket.SOCK_SEQPACKET and _is_shut_down(sock)
    left = bytes_in(sock)
    _seek(sock, 0)
    while (message := _peek(sock, _LONGEST)) is not None:
        if ends and not message.queued.data and left <= 0:
            break
        while message.flags & socket.MSG_TRUNC and (rest := _peek(sock, _LONGEST)):     # the rest of the same message
            for fd in rest.queued.fds:
                os.close(fd)
            whole = message.queued._replace(data=message.queued.data + rest.queued.data)
            message = _Look(whole, rest.flags)
        found.append(message.queued)
        left -= len(message.queued.data)


def _has_passed_over(sock: socket.socket, found: list[Queued]) -> bool:
    """Whether the first message is missing. The kernel marks an empty message that was peeked at, and a later walk
    passes over it (skb_set_peeked in net/core/datagram.c)."""
    _seek(sock, -1)
    first = _peek(sock, _LONGEST)
    for fd in first.queued.fds if first else ():
        os.close(fd)
    # a socket that was shut down returns nothing for ever
    return bool(first and not first.queued.data and not _is_shut_down(sock) and (not found or found[0].data))


def _is_shut_down(sock: socket.socket) -> bool:
    return polls(sock, select.POLLRDHUP)


def _walk_stream(sock: socket.socket, found: list[Queued]) -> None:
    left, at = bytes_in(sock), 0       # recvmsg(2) of an empty queue would consume a pending error
    inline = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE))
    if left and _at_mark(sock) and not inline:
        # a peek passes over an urgent byte at the head, and its offsets do not count it
        found.append(Queued(sock.recv(1, socket.MSG_OOB | _PEEK), urgent=True))
        left -= 1
    while left > 0:
        _seek(sock, at)
        message = _peek(sock, min(left, _LONGEST))
        if message is None or not message.queued.data:
            return
        queued = message.queued
        found.append(queued)
        at += len(queued.data)
        left -= len(queued.data)
        if queued.fds and (plain := _plain_bytes(sock, at - len(queued.data), len(queued.data))):
            # a peek joins bytes without files to the following bytes with files; a read may end in between
            found[-1:] = [queued._replace(data=queued.data[:plain], fds=()),
                          queued._replace(data=queued.data[plain:])]
    if found and not found[0].urgent:
        _split_urgent(sock, found, inline=inline)


def _plain_bytes(sock: socket.socket, at: int, length: int) -> int:
    """Return how many of these bytes, which have files attached, are in front of the files.

    The kernel copies one send(2) after the other (unix_stream_read_generic in net/unix/af_unix.c) and stops at one that
    does not fit into memory. So the memory behind a buffer that is one byte too short is made unwritable: the kernel
    then copies the whole sends before the last one, and the files belong to the last one.
    """
    size = (length - 1 + PAGE - 1) // PAGE * PAGE
    with mmap.mmap(-1, size + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        mprotect(ctypes.addressof(anchor) + size, PAGE, 0)
        view = memoryview(memory)
        try:
            _seek(sock, at)
            return sock.recvmsg_into([view[size - (length - 1):size + 1]], 0, _PEEK)[0]
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return 0
        finally:
            view.release()
            del anchor


def _split_urgent(sock: socket.socket, found: list[Queued], *, inline: bool) -> None:
    """Split off the urgent byte (send(2) with MSG_OOB): a peek ends in front of it without any other reason."""
    borders = [0] if inline and _at_mark(sock) else [
        number for number in range(1, len(found))
        if not found[number - 1].fds and not found[number].fds and found[number - 1].sender == found[number].sender
        and len(found[number - 1].data) % _LONGEST]
    if not inline:
        try:
            byte = sock.recv(1, socket.MSG_OOB | _PEEK)
        except OSError:     # EINVAL: there is none, or it was received
            return
        borders = [number for number in borders if found[number].data[:1] == byte]
    for number in borders[-1:]:
        one = found[number]
        rest = [one._replace(data=one.data[1:])] if len(one.data) > 1 else []
        found[number:number + 1] = [one._replace(data=one.data[:1], urgent=True), *rest]


def _at_mark(sock: socket.socket) -> bool:
    return bool(struct.unpack('i', fcntl.ioctl(sock, SIOCATMARK, bytes(4)))[0])


class _Look(NamedTuple):
    queued: Queued
    flags: int


def _peek(sock: socket.socket, length: int) -> _Look | None:
    """Peek once by recvmsg(2). None if there is nothing more."""
    try:
        data, control, flags, address = sock.recvmsg(length, _CONTROL, _PEEK)
    except BlockingIOError:
        return None
    fds, sender = _parse_control(control)
    if isinstance(address, tuple):
        return _Look(Queued(data, fds, sender, sender_address=address_of(address)), flags)
    name = address if isinstance(address, bytes) else os.fsencode(address or '')
    return _Look(Queued(data, fds, sender, address=name), flags)


def _parse_control(control: list[Any]) -> tuple[tuple[int, ...], SocketCredentials | None]:
    fds: tuple[int, ...] = ()
    sender: SocketCredentials | None = None
    for level, kind, value in control:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            fds = struct.unpack(f'={len(value) // 4}i', value[:len(value) // 4 * 4])
        elif kind == socket.SCM_CREDENTIALS:
            sender = SocketCredentials(*UCRED.unpack(value[:UCRED.size]))
        elif kind == SCM_PIDFD:
            [pidfd] = struct.unpack('=i', value[:4])
            sender = sender or _owner_of(pidfd)
            if pidfd >= 0:
                os.close(pidfd)
    return fds, sender


def _owner_of(pidfd: int) -> SocketCredentials:
    """Return the process of a pidfd, with its present ids."""
    with suppress(OSError):
        pid = pidfd_pid(pidfd)
        status = read_status(pid)
        return SocketCredentials(pid, status.uids[1], status.gids[1])
    return SocketCredentials(0, 0, 0)


def _seek(sock: socket.socket, offset: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)


# ---------------------------------------------------------------- peek offsets

def peek_offset(sock: socket.socket) -> int:
    """Return SO_PEEK_OFF: -1, or the offset at which the program's next peek begins."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)


def sockets_below(sock: socket.socket, wanted: Mapping[int, int]) -> Iterator[socket.socket]:
    """Yield the sockets of `wanted` (by inode) that are this one or are in its queue, at any depth.

    Each is closed when the next one is requested.
    """
    todo, seen = [os.dup(sock.fileno())], set[int]()
    try:
        while todo:
            with socket.socket(fileno=todo.pop()) as one:
                inode = os.fstat(one.fileno()).st_ino
                if one.family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) or inode in seen:
                    continue
                seen.add(inode)
                if inode in wanted and one.family == socket.AF_UNIX and not has_error(one):
                    # the queue must be walked before the old value is restored
                    todo += [fd for message in _walk(one) for fd in message.fds if _keep_socket(fd)]
                if inode in wanted:
                    yield one
    finally:
        for fd in todo:
            os.close(fd)


def _keep_socket(fd: int) -> bool:
    """Whether this fd of ours is a socket. Any other file is closed."""
    try:
        socket.socket(fileno=os.dup(fd)).close()
    except OSError as error:
        os.close(fd)
        if error.errno != errno.ENOTSOCK:
            raise
        return False
    return True

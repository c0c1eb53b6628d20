# SPDX-License-Identifier: LGPL-2.1-or-later
"""Socket options (socket(7)): a table of those that can be read and written. Only those that differ from a fresh socket
are kept."""

import errno
import socket
from contextlib import suppress
from functools import lru_cache

from ckptd.errors import CkptError
from ckptd.image.grammar import U32, Struct, layout
from ckptd.kernel.sockopt import (
    SO_BINDTOIFINDEX,
    SO_BUF_LOCK,
    SO_BUSY_POLL,
    SO_BUSY_POLL_BUDGET,
    SO_INCOMING_CPU,
    SO_INQ,
    SO_MAX_PACING_RATE,
    SO_NO_CHECK,
    SO_NOFCS,
    SO_PASSPIDFD,
    SO_PASSRIGHTS,
    SO_PEEK_OFF,
    SO_PREFER_BUSY_POLL,
    SO_RCVBUFFORCE,
    SO_RCVMARK,
    SO_RCVPRIORITY,
    SO_RXQ_OVFL,
    SO_SELECT_ERR_QUEUE,
    SO_SNDBUFFORCE,
    SO_TIMESTAMP,
    SO_TIMESTAMP_NEW,
    SO_TIMESTAMPING,
    SO_TIMESTAMPING_NEW,
    SO_TIMESTAMPNS,
    SO_TIMESTAMPNS_NEW,
    SO_TXREHASH,
    SO_TXTIME,
    SO_WIFI_STATUS,
    SO_ZEROCOPY,
)

_TIMEVAL, _LINGER, _INT, _PAIR = 16, 8, 4, 8

# Option: bytes of its value. They are set in this order: among the options of timestamps the last one decides about the
# format. Buffer sizes and their locks depend on each other, so they are below; SO_LOCK_FILTER is in socket_filter.py.
_SIZES = {
    socket.SO_DEBUG: _INT, socket.SO_REUSEADDR: _INT, socket.SO_REUSEPORT: _INT, socket.SO_DONTROUTE: _INT,
    socket.SO_BROADCAST: _INT, socket.SO_KEEPALIVE: _INT, socket.SO_OOBINLINE: _INT, SO_NO_CHECK: _INT,
    socket.SO_PRIORITY: _INT, socket.SO_LINGER: _LINGER, socket.SO_PASSCRED: _INT, socket.SO_PASSSEC: _INT,
    socket.SO_RCVLOWAT: _INT, socket.SO_RCVTIMEO: _TIMEVAL, socket.SO_SNDTIMEO: _TIMEVAL, socket.SO_MARK: _INT,
    SO_TIMESTAMP: _INT, SO_TIMESTAMPNS: _INT, SO_TIMESTAMPING: _PAIR, SO_RXQ_OVFL: _INT, SO_WIFI_STATUS: _INT,
    SO_PEEK_OFF: _INT, SO_NOFCS: _INT, SO_SELECT_ERR_QUEUE: _INT, SO_BUSY_POLL: _INT,
    SO_MAX_PACING_RATE: 8, SO_INCOMING_CPU: _INT, SO_TXTIME: _PAIR, SO_BINDTOIFINDEX: _INT, SO_TIMESTAMP_NEW: _INT,
    SO_TIMESTAMPNS_NEW: _INT, SO_TIMESTAMPING_NEW: _PAIR, SO_PREFER_BUSY_POLL: _INT, SO_BUSY_POLL_BUDGET: _INT,
    SO_TXREHASH: _INT, SO_ZEROCOPY: _INT, SO_RCVMARK: _INT, SO_PASSPIDFD: _INT, SO_RCVPRIORITY: _INT,
    SO_PASSRIGHTS: _INT, SO_INQ: _INT,
}
# option, the one that may exceed the limit of the machine, and its bit of SO_BUF_LOCK
_BUFFERS = ((socket.SO_SNDBUF, SO_SNDBUFFORCE, 1), (socket.SO_RCVBUF, SO_RCVBUFFORCE, 2))


@layout
class SocketOption(Struct):
    """A socket option. name: SO_*. value: as getsockopt(2) returns it."""
    name: U32
    value: bytes


def dump_options(sock: socket.socket) -> tuple[SocketOption, ...]:
    """Return the options that differ from those of a fresh socket of the same family and type."""
    fresh = _fresh_options(sock.family, sock.type, sock.proto)
    found = [SocketOption(name, value) for name, value in read_options(sock).items() if fresh.get(name) != value]
    locks, usual = buffer_locks(sock), _fresh_buffers(sock.family, sock.type, sock.proto)
    # A program may have taken back the lock of a size that it has set. MPTCP cannot do that (net/mptcp/sockopt.c), so
    # a size without a lock is left to the kernel.
    can_unlock = sock.proto != socket.IPPROTO_MPTCP
    sizes = [SocketOption(name, _buffer(sock, name)) for name, _, lock in _BUFFERS
             if locks & lock or (can_unlock and _buffer(sock, name) != usual.get(name))]
    if can_unlock and (sizes or locks):
        sizes.append(SocketOption(SO_BUF_LOCK, locks.to_bytes(_INT, 'little')))
    return *found, *sizes


def set_options(sock: socket.socket, options: tuple[SocketOption, ...], link: str) -> None:
    """Set options. CkptError for a value that may not be set here."""
    for option in options:
        if option.name in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            set_buffer(sock, option.name, int.from_bytes(option.value[:_INT], 'little'))
            continue
        if option.name not in (*_SIZES, SO_BUF_LOCK):
            raise CkptError(f'{link}: socket option {option.name} is not one that a checkpoint keeps',
                            errno=errno.EBADMSG, resource=link)
        try:
            sock.setsockopt(socket.SOL_SOCKET, option.name, option.value)
        except OSError as error:
            raise CkptError(f'{link}: socket option {option.name} cannot be set again: {error.strerror}',
                            errno=error.errno, resource=link, hint='restore it as root') from error


def buffer_locks(sock: socket.socket) -> int:
    """Return SO_BUF_LOCK: the buffer sizes that the program has set, 1 send, 2 receive; 0 before Linux 5.15."""
    with suppress(OSError):
        return sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)
    return 0


def set_buffer(sock: socket.socket, name: int, size: int) -> None:
    """Set SO_SNDBUF or SO_RCVBUF. size: as getsockopt(2) returns it, twice the argument of setsockopt(2)."""
    force = next(force for option, force, _ in _BUFFERS if option == name)
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size // 2)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, name, size // 2)


def _buffer(sock: socket.socket, name: int) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, name, _INT)


def read_options(sock: socket.socket) -> dict[int, bytes]:
    """Return all options of the table that this socket has, without buffer sizes."""
    found = {}
    for name, size in _SIZES.items():
        try:
            found[name] = sock.getsockopt(socket.SOL_SOCKET, name, size)
        except OSError as error:
            if error.errno not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL):
                raise       # otherwise this kernel, or this family, has no such option
    return found


@lru_cache(maxsize=16)
def _fresh_buffers(family: int, kind: int, protocol: int) -> dict[int, bytes]:
    with suppress(PermissionError), socket.socket(family, kind, protocol) as sock:
        return {name: _buffer(sock, name) for name, _, _ in _BUFFERS}
    return {}       # of a kind that only root may make


@lru_cache(maxsize=16)
def _fresh_options(family: int, kind: int, protocol: int) -> dict[int, bytes]:
    with suppress(PermissionError), socket.socket(family, kind, protocol) as sock:
        return read_options(sock)
    return {}

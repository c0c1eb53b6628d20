# SPDX-License-Identifier: LGPL-2.1-or-later
"""The queues of a TCP connection (tcp(7)), read without taking anything out."""

import array
import ctypes
import errno
import fcntl
import socket
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from ckptd.kernel.decl import c_int, c_uint, c_void_p, libc
from ckptd.kernel.sockopt import SO_PEEK_OFF
from ckptd.kernel.tcp_segment import ACK, FIN, Segment, deliver

# <linux/tcp.h>
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 22, 24, 29
TCP_REPAIR_ON, TCP_REPAIR_OFF, TCP_REPAIR_OFF_NO_WP = 1, 0, -1      # the last one sends no window probe
TCP_NO_QUEUE, TCP_RECV_QUEUE, TCP_SEND_QUEUE = 0, 1, 2

SIOCATMARK: Final = 0x8905          # <asm-generic/sockios.h>

_SOCKADDR: Final = 16               # sizeof(struct sockaddr); zeros are AF_UNSPEC
TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK, TCPI_OPT_WSCALE = 1, 2, 4
_OPT_MSS, _OPT_WINDOW, _OPT_SACK, _OPT_TIMESTAMP = 2, 3, 4, 8       # <net/tcp.h>, TCPOPT_*
_OPTIONS_AT, _SCALES_AT, _ADVERTISED_AT = 5, 6, 84      # offsets in struct tcp_info, <linux/tcp.h>
_WINDOW = struct.Struct('=5I')      # struct tcp_repair_window
_PIECE = 1 << 16                    # bytes that are put into a queue at once

_LOW: Final = (1 << 32) - 1         # sequence numbers are modulo 2**32
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def unsent(sock: socket.socket) -> int:
    """Return the bytes that the peer has not acknowledged (SIOCOUTQ), and one for a FIN."""
    return _count(sock, termios.TIOCOUTQ)


def unread(sock: socket.socket) -> int:
    """Return the bytes in the receive queue (FIONREAD), up to an urgent byte."""
    return _count(sock, termios.FIONREAD)


def _count(sock: socket.socket, request: int) -> int:
    count = array.array('i', [0])
    fcntl.ioctl(sock, request, count)
    return count[0]


@libc
def _connect(sockfd: c_int, addr: c_void_p, addrlen: c_uint) -> c_int: ...


class Stream(NamedTuple):
    """The receive queue of a connection. urgent: a byte of MSG_OOB between the other two, b'' for none."""
    data: bytes
    urgent: bytes = b''
    later: bytes = b''


def peek_stream(sock: socket.socket) -> Stream:
    """Return the receive queue. Sets SO_PEEK_OFF: the caller must restore the old value in any case. Without it, before
    Linux 6.9, nothing behind an urgent byte is found: OSError EAGAIN."""
    urgent, inline = _urgent(sock), sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
    is_first = at_mark(sock)
    can_seek = _seek(sock)
    data = _peek(sock)
    if is_first:
        # a peek passes over an urgent byte at the head, unless that is part of the stream
        return Stream(b'', data[:1], data[1:]) if inline else Stream(b'', urgent, data)
    later = _peek(sock) if can_seek else b''        # a peek ends at an urgent byte
    if urgent and not can_seek:
        raise OSError(errno.EAGAIN, 'an urgent byte (MSG_OOB) waits in it')
    if later and inline:
        return Stream(data, later[:1], later[1:])
    return Stream(data, urgent, later)


def at_mark(sock: socket.socket) -> bool:
    """Whether an urgent byte is the next one of the receive queue (SIOCATMARK, sockatmark(3))."""
    return bool(struct.unpack('=i', fcntl.ioctl(sock, SIOCATMARK, bytes(4)))[0])


def _urgent(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1, socket.MSG_OOB | _PEEK)
    except OSError:             # EINVAL: there is none, it was read, or it is part of the stream
        return b''


def _seek(sock: socket.socket) -> bool:
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def _peek(sock: socket.socket) -> bytes:
    try:
        return sock.recv(2 * sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), _PEEK)   # more than it can have
    except BlockingIOError:
        return b''


def peek_offset(sock: socket.socket) -> int:
    """Return SO_PEEK_OFF; -1 before Linux 6.9, which has none for TCP."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOPROTOOPT):
            raise
        return -1


def set_peek_offset(sock: socket.socket, offset: int) -> None:
    """Set SO_PEEK_OFF. Does nothing for a kernel that has none for TCP."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


@contextmanager
def in_repair(sock: socket.socket) -> Iterator[None]:
    """Keep the socket in repair mode in this block, where its send queue and its sequence numbers can be read. It sends
    nothing meanwhile. PermissionError without CAP_NET_ADMIN."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON)
    try:
        yield
    finally:
        leave_repair(sock)


def leave_repair(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)


def reset(sock: socket.socket) -> None:
    """End a connection by a reset, as connect(2) to AF_UNSPEC does. OSError."""
    address = ctypes.create_string_buffer(_SOCKADDR)
    _connect(sock.fileno(), ctypes.addressof(address), _SOCKADDR)


def told(sock: socket.socket) -> tuple[int, int]:
    """Return what this end of a connection has told its peer: the MSS, without options, and its window scale."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ADVERTISED_AT + 4)
    return int.from_bytes(info[_ADVERTISED_AT:], 'little'), info[_SCALES_AT] >> 4


def sequence(sock: socket.socket, queue: int) -> int:
    """Return the number behind the last byte of a queue, of a socket in repair mode."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
    return int(struct.unpack('=I', sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, 4))[0])


def peek_unsent(sock: socket.socket, received: int, *, has_fin: bool) -> bytes:
    """Return the bytes of the send queue from sequence number `received` on, of a socket in repair mode."""
    end = sequence(sock, TCP_SEND_QUEUE) - has_fin
    size = end - received & _LOW
    if not size or size > 1 << 31:      # its FIN has arrived as well
        return b''
    queued = sock.recv(unsent(sock), _PEEK)
    return queued[len(queued) - size:]


# ---------------------------------------------------------------- a connection that goes on in another socket

class Repair(NamedTuple):
    """The state of a connection, read in repair mode, that is needed to go on with it. Its FINs are not counted."""
    received: int           # sequence number behind the last byte received
    sent: int               # sequence number behind the last byte that the program has sent
    mss: int                # TCP_MAXSEG
    options: int            # TCPI_OPT_*
    send_scale: int         # window scale of what the peer receives
    receive_scale: int      # window scale of what is received
    timestamp: int
    window: bytes           # struct tcp_repair_window
    advertised: int         # MSS that this end has told its peer, without its options


def read_repair(sock: socket.socket, *, has_received_fin: bool, has_sent_fin: bool) -> Repair:
    """Read the state of a socket in repair mode."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ADVERTISED_AT + 4)
    received = sequence(sock, TCP_RECV_QUEUE) - has_received_fin & _LOW
    return Repair(received, sequence(sock, TCP_SEND_QUEUE) - has_sent_fin & _LOW,
                  sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG), info[_OPTIONS_AT],
                  info[_SCALES_AT] & 15, info[_SCALES_AT] >> 4,
                  int(struct.unpack('=I', sock.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, 4))[0]),
                  _window_before(received, sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, _WINDOW.size),
                                 has_received_fin=has_received_fin),
                  int.from_bytes(info[_ADVERTISED_AT:], 'little'))


def _window_before(received: int, window: bytes, *, has_received_fin: bool) -> bytes:
    """Return struct tcp_repair_window as it was before the FIN of the peer."""
    sent_at, sent, largest, open_, told_at = _WINDOW.unpack(window)
    if has_received_fin and told_at == received + 1 & _LOW:
        told_at, open_ = received, open_ + 1
    return _WINDOW.pack(sent_at, sent, largest, open_, told_at)


def receive_fin(sock: socket.socket, state: Repair, unsent_bytes: int) -> None:
    """Let a socket that has left repair mode receive the FIN of its peer, which does not send it again. OSError."""
    (host, port, *_), (peer, peer_port, *_) = sock.getsockname(), sock.getpeername()
    ends = [(address.partition('%')[0].removeprefix('::ffff:') if '.' in address else address.partition('%')[0], number)
            for address, number in ((peer, peer_port), (host, port))]
    family = socket.AF_INET if '.' in ends[0][0] else socket.AF_INET6
    window = min(_WINDOW.unpack(state.window)[1] >> state.send_scale, (1 << 16) - 1)
    deliver(family, ends[0], ends[1], Segment(FIN | ACK, state.received, state.sent - unsent_bytes & _LOW, window))


def connect_in_repair(sock: socket.socket, peer: tuple[object, ...], state: Repair, unread: int, unsent_bytes: int
                      ) -> None:
    """Make a bound socket in repair mode one end of a connection. No packet is sent. unread,
    unsent_bytes: lengths of the queues, which `fill_queue` fills afterwards. OSError."""
    for queue, end, length in ((TCP_RECV_QUEUE, state.received, unread), (TCP_SEND_QUEUE, state.sent, unsent_bytes)):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, struct.pack('=I', end - length & _LOW))
    # connect(2) takes the MSS of the route, without the room for time stamps, unless the program wants a smaller one
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, state.advertised)
    sock.connect(peer)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 0)
    options = [(_OPT_MSS, state.mss)]
    if state.options & TCPI_OPT_WSCALE:
        options.append((_OPT_WINDOW, state.send_scale | state.receive_scale << 16))
    if state.options & TCPI_OPT_SACK:
        options.append((_OPT_SACK, 0))
    if state.options & TCPI_OPT_TIMESTAMPS:
        options.append((_OPT_TIMESTAMP, 0))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS,
                    b''.join(struct.pack('=II', *option) for option in options))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP, struct.pack('=I', state.timestamp))


def fill_queue(sock: socket.socket, queue: int, data: bytes) -> None:
    """Put bytes into a queue of a socket in repair mode. What is in the send queue counts as sent."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
    rest = memoryview(data)
    while rest:
        rest = rest[sock.send(rest[:_PIECE]):]


def set_window(sock: socket.socket, window: bytes) -> None:
    """Set struct tcp_repair_window, after the queues are filled."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_NO_QUEUE)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, window)


def enter_repair(sock: socket.socket) -> None:
    """Begin repair mode. A socket that is closed in it sends nothing. PermissionError without CAP_NET_ADMIN."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON)


def resume(sock: socket.socket) -> None:
    """End repair mode, and send a window probe, which tells both ends how far they are."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF)


def peek_send_queue(sock: socket.socket) -> bytes:
    """Return all bytes that the peer has not acknowledged, of a socket in repair mode."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
    count = unsent(sock)
    return sock.recv(count, _PEEK) if count else b''


def peek_whole(sock: socket.socket) -> bytes | None:
    """Return the whole receive queue of a socket in repair mode; None if an urgent byte waits, whose mark would be
    lost."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_RECV_QUEUE)
    before = peek_offset(sock)
    try:
        stream = peek_stream(sock)
    except BlockingIOError:
        return None
    finally:
        set_peek_offset(sock, before)
    return None if stream.urgent or stream.later else stream.data

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The numbers that an end of a TCP connection has told its peer in the handshake (RFC 7323): the largest segment and
the window scale. Options that the program has set before it decide about them: TCP_MAXSEG, TCP_WINDOW_CLAMP, SO_RCVBUF.
"""

import socket
import struct
from functools import lru_cache

from ckptd.image.grammar import U8, U32, Struct, layout
from ckptd.kernel import tcp

_TIMESTAMPS = 12            # bytes of that option, which the kernel takes off the segment
_SEGMENTS = range(88, 1 << 15)      # TCP_MIN_MSS and MAX_TCP_WINDOW of <net/tcp.h>: what TCP_MAXSEG takes
_HIGHEST_SCALE = 14


@layout
class Agreement(Struct):
    """The numbers of one end. All 0: it is not known."""
    segment: U32 = 0        # bytes, without options
    scale: U8 = 0           # of the window in which it receives
    clamp: U32 = 0          # TCP_WINDOW_CLAMP now


def read_agreement(sock: socket.socket) -> Agreement:
    """Read the numbers of a connection. OSError."""
    return Agreement(*tcp.told(sock), sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP))


def prepare(sock: socket.socket, wanted: Agreement) -> None:
    """Let a handshake of this socket, or of a listener, tell these numbers. OSError."""
    if wanted.segment + _TIMESTAMPS in _SEGMENTS:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, wanted.segment + _TIMESTAMPS)
    if _is_special(wanted):
        # the clamp may have changed since
        clamp = wanted.clamp if _scale_of(wanted.clamp) == wanted.scale else (1 << 16 + wanted.scale) - 1
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, clamp)


def complete(sock: socket.socket, wanted: Agreement) -> None:
    """Take back what `prepare` has set. sock: of a connection. OSError."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 0)
    if _is_special(wanted):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, min(wanted.clamp, (1 << 31) - 1))


def _is_special(wanted: Agreement) -> bool:
    """Whether another scale than the usual one of this machine is wanted."""
    return wanted.clamp != 0 and wanted.scale <= _HIGHEST_SCALE and wanted.scale != _usual_scale()


def _scale_of(clamp: int) -> int:
    """Return the scale of a largest window, as tcp_select_initial_window() of the kernel does."""
    return max(clamp.bit_length() - 16, 0)


@lru_cache(maxsize=1)
def _usual_scale() -> int:
    with socket.create_server(('127.0.0.1', 0)) as server, socket.create_connection(server.getsockname()) as client:
        # it leaves no connection in time-wait
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('=ii', 1, 0))
        return tcp.told(client)[1]

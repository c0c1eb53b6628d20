# SPDX-License-Identifier: LGPL-2.1-or-later
"""Socket options and control messages that the module socket lacks, from <asm-generic/socket.h>, and getsockopt(2) for
values above the 1024 bytes that its method takes."""

import ctypes
import socket
import struct

from ckptd.kernel.decl import c_int, c_void_p, libc

SO_NO_CHECK = 11
SO_ATTACH_FILTER = 26
SO_GET_FILTER = 26                  # SO_ATTACH_FILTER, for getsockopt(2)
SO_TIMESTAMP, SO_TIMESTAMPNS, SO_TIMESTAMPING = 29, 35, 37
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
SO_PROTOCOL, SO_DOMAIN = 38, 39
SO_RXQ_OVFL = 40
SO_WIFI_STATUS = 41
SO_PEEK_OFF = 42
SO_NOFCS = 43
SO_LOCK_FILTER = 44
SO_SELECT_ERR_QUEUE = 45
SO_BUSY_POLL = 46
SO_MAX_PACING_RATE = 47
SO_INCOMING_CPU = 49
SO_PEERGROUPS = 59
SO_ZEROCOPY = 60                    # since 4.14
SO_TXTIME = 61                      # since 4.19
SO_BINDTOIFINDEX = 62               # since 5.1, as are the next ones
SO_TIMESTAMP_NEW, SO_TIMESTAMPNS_NEW, SO_TIMESTAMPING_NEW = 63, 64, 65
SO_PREFER_BUSY_POLL, SO_BUSY_POLL_BUDGET = 69, 70       # since 5.11
SO_NETNS_COOKIE = 71                # since 5.14
SO_BUF_LOCK = 72                    # since 5.15
SO_TXREHASH = 74                    # since 6.0
SO_RCVMARK = 75                     # since 6.0
SO_PASSPIDFD = 76                   # since 6.5
SO_RCVPRIORITY = 82                 # since 6.14
SO_PASSRIGHTS = 83                  # since 6.16
SO_INQ = 84                         # since 6.17

BPF_MAXINSNS = 4096                 # <linux/bpf_common.h>
SOCK_FILTER = struct.Struct('=HBBI')        # struct sock_filter of <linux/filter.h>
_SOCK_FPROG = struct.Struct('=HxxxxxxQ')    # struct sock_fprog


@libc
def _getsockopt(sockfd: c_int, level: c_int, optname: c_int, optval: c_void_p, optlen: c_void_p) -> c_int: ...


def read_option(sock: socket.socket, name: int, size: int, level: int = socket.SOL_SOCKET, given: bytes = b'') -> bytes:
    """Return an option with up to `size` bytes. given: the first bytes of the buffer, for options that ask about
    something. OSError."""
    value, length = _read(sock, name, size, level, given)
    return value[:length]


def read_filter(sock: socket.socket) -> bytes:
    """Return the classic filter of a socket: its struct sock_filter in a row, b'' for none. PermissionError for an eBPF
    program, which cannot be read."""
    value, count = _read(sock, SO_GET_FILTER, BPF_MAXINSNS * SOCK_FILTER.size)
    return value[:count * SOCK_FILTER.size]     # the kernel counts instructions, not bytes


def attach_filter(sock: socket.socket, program: bytes) -> None:
    """Attach a classic filter, as SO_ATTACH_FILTER does. OSError."""
    code = ctypes.create_string_buffer(program, len(program))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER,
                    _SOCK_FPROG.pack(len(program) // SOCK_FILTER.size, ctypes.addressof(code)))


def _read(sock: socket.socket, name: int, size: int, level: int = socket.SOL_SOCKET,
          given: bytes = b'') -> tuple[bytes, int]:
    value, length = ctypes.create_string_buffer(given, size), ctypes.c_uint32(size)
    _getsockopt(sock.fileno(), level, name, ctypes.addressof(value), ctypes.addressof(length))
    return value.raw, length.value

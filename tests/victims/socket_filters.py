# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets with classic filters (SO_ATTACH_FILTER): one that cuts what arrives, the longest one, and locks."""

import ctypes
import socket
import struct

from victim import ready, wait_for_go

UNIX, SOL = socket.AF_UNIX, socket.SOL_SOCKET
ATTACH_FILTER, DETACH_FILTER, LOCK_FILTER = 26, 27, 44
ACCEPT_4, ACCEPT_ALL = 4, 0xFFFF
LONGEST = 4096

libc = ctypes.CDLL(None, use_errno=True)


def program(accept: int, instructions: int = 1) -> bytes:
    return struct.pack('=HBBI', 6, 0, 0, accept) * instructions     # BPF_RET | BPF_K


def attach(sock: socket.socket, code: bytes) -> None:
    held = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(SOL, ATTACH_FILTER, struct.pack('=HxxxxxxQ', len(code) // 8, ctypes.addressof(held)))


def read(sock: socket.socket) -> bytes:
    held, length = ctypes.create_string_buffer(8 * LONGEST), ctypes.c_uint32(8 * LONGEST)
    assert libc.getsockopt(sock.fileno(), SOL, ATTACH_FILTER, held, ctypes.byref(length)) == 0
    return held.raw[:8 * length.value]


cut, sender = socket.socketpair(UNIX, socket.SOCK_DGRAM)
sender.send(b'whole message')       # it waits in the queue when the filter comes
attach(cut, program(ACCEPT_4))
cut.setsockopt(SOL, LOCK_FILTER, 1)
longest = socket.socket(UNIX, socket.SOCK_DGRAM)
attach(longest, program(ACCEPT_ALL, LONGEST))
locked = socket.socket(UNIX)
locked.setsockopt(SOL, LOCK_FILTER, 1)

ready()
wait_for_go()

assert cut.recv(100) == b'whole message'
sender.send(b'another message')
assert cut.recv(100) == b'anot'
assert read(cut) == program(ACCEPT_4)
assert read(longest) == program(ACCEPT_ALL, LONGEST)
longest.setsockopt(SOL, DETACH_FILTER, 0)
for one in (cut, locked):
    assert one.getsockopt(SOL, LOCK_FILTER) == 1
    try:
        attach(one, program(ACCEPT_ALL))
        raise AssertionError('it is locked')
    except PermissionError:
        pass

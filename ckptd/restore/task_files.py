# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that a restored process makes itself: sockets, because the kernel tells their peers which process made them,
and files whose path leads to different files for different processes.

A stub that is root takes the ids of a socket's maker for the duration of the call. A stub of an ordinary user has its
own, which are the only ones that it could take.
"""

import os
import socket
import struct
from collections.abc import Callable, Sequence

from ckptd.kernel.namei import AT_FDCWD
from ckptd.kernel.pidfd import pidfd_getfd, pidfd_open
from ckptd.objects.files.base import Maker
from ckptd.remote.batch import Batch, Out
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub

_KEEP = -1      # setresuid(2): this id stays
Mail = tuple[socket.socket, int]        # a channel to send fds to stubs: our end, and theirs as a service fd


def make_socketpair(stub: Stub, kind: int, maker: Maker) -> tuple[int, int]:
    """Let a stub call socketpair(2), and take over both ends. OSError."""
    batch = Batch()
    out = batch.buffer(8)
    _add_call(batch, maker, lambda: batch.call('socketpair', socket.AF_UNIX, kind, 0, out))
    first, second = struct.unpack('=2i', stub.do(batch).data(out))
    try:
        mine, theirs = _take_over(stub, first, second)
        return mine, theirs
    finally:
        _close(stub, first, second)


def listen_as(stub: Stub, mail: Mail, fd: int, backlog: int, maker: Maker) -> None:
    """Let a stub call listen(2) for a socket of ours. OSError."""
    received = receive_in(stub, mail, fd)
    try:
        batch = Batch()
        _add_call(batch, maker, lambda: batch.call('listen', received, backlog))
        stub.do(batch)
    finally:
        _close(stub, received)


def connect_as(stub: Stub, mail: Mail, fd: int, address: bytes, at: int, maker: Maker) -> None:
    """Let a stub call connect(2) for a socket of ours, as RestoreContext.connect_socket does. OSError."""
    received = [receive_in(stub, mail, one) for one in (fd, at) if one >= 0]
    try:
        if at >= 0:
            address = struct.pack('=H', socket.AF_UNIX) + f'/proc/self/fd/{received[1]}'.encode() + b'\0'
        batch = Batch()
        where = batch.buffer(len(address), address)
        _add_call(batch, maker, lambda: batch.call('connect', received[0], where, len(address)))
        stub.do(batch)
    finally:
        _close(stub, *received)


def receive_in(stub: Stub, mail: Mail, fd: int) -> int:
    """Pass an fd to a stub that did not inherit it (unix(7), SCM_RIGHTS). Return its number there."""
    ours, theirs = mail
    socket.send_fds(ours, [b'f'], [fd])
    batch = Batch()
    byte, iov, control = batch.buffer(8), batch.buffer(16, struct.pack('<QQ', 0, 1)), batch.buffer(24)
    header = batch.buffer(56, struct.pack('<QIxxxxQQQQi', 0, 0, 0, 1, 0, 24, 0))
    batch.pointer(iov.offset, byte)
    batch.pointer(header.offset + 16, iov)
    batch.pointer(header.offset + 32, control)
    batch.call('recvmsg', theirs, header, 0)
    [received] = struct.unpack_from('<i', stub.do(batch).data(control), 16)
    return int(received)


def _add_call(batch: Batch, maker: Maker, add: Callable[[], object]) -> None:
    """Add a call that is made with the maker's ids."""
    is_root = os.geteuid() == 0
    if is_root:
        _set_groups(batch, maker.groups)
        batch.call('setresgid', _KEEP, maker.gid, _KEEP)
        batch.call('setresuid', _KEEP, maker.uid, _KEEP)
    add()
    if is_root:
        batch.call('setresuid', _KEEP, 0, _KEEP)
        batch.call('setresgid', _KEEP, os.getegid(), _KEEP)
        _set_groups(batch, os.getgroups())


def _set_groups(batch: Batch, groups: Sequence[int]) -> None:
    listed: Out = batch.buffer(4 * len(groups) or 4, struct.pack(f'={len(groups)}I', *groups))
    batch.call('setgroups', len(groups), listed)


def _close(stub: Stub, *fds: int) -> None:
    batch = Batch()
    for fd in fds:
        batch.call('close', fd)
    stub.do(batch)


def open_by_task(stub: Stub, path: str, flags: int) -> int:
    """Let a stub open a path. Return our fd of the file. OSError."""
    script = Script(stub)
    fd = script.call_now('openat', AT_FDCWD, os.fsencode(path) + b'\0', flags | os.O_CLOEXEC, 0)
    try:
        [mine] = _take_over(stub, fd)
        return mine
    finally:
        script.call_now('close', fd)


def _take_over(stub: Stub, *fds: int) -> list[int]:
    """Return our own fds of files of a stub."""
    found: list[int] = []
    pidfd = pidfd_open(stub.tid)
    try:
        for fd in fds:
            found.append(pidfd_getfd(pidfd, fd))
    except BaseException:
        for fd in found:
            os.close(fd)
        raise
    finally:
        os.close(pidfd)
    return found

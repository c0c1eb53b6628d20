# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that a restored process makes itself: sockets, because the kernel tells their peers which process made them,
and files whose path leads to different files for different processes."""

import os
import socket
import struct
from collections.abc import Sequence

from ckptd.kernel.namei import AT_FDCWD
from ckptd.kernel.pidfd import pidfd_getfd, pidfd_open
from ckptd.remote.batch import Batch
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub

_KEEP = -1      # setresuid(2): this id stays


def make_socketpair(stub: Stub, kind: int, uid: int, gid: int, groups: Sequence[int]) -> tuple[int, int]:
    """Let a stub call socketpair(2), and take over both ends. SO_PEERCRED then names its process and these ids.

    A stub that is root takes the ids for the duration of the call. One of an ordinary user has its own, which are the
    only ones that it could take. OSError.
    """
    batch = Batch()
    out = batch.buffer(8)
    is_root = os.geteuid() == 0
    if is_root:
        _set_groups(batch, groups)
        batch.call('setresgid', _KEEP, gid, _KEEP)
        batch.call('setresuid', _KEEP, uid, _KEEP)
    batch.call('socketpair', socket.AF_UNIX, kind, 0, out)
    if is_root:
        batch.call('setresuid', _KEEP, 0, _KEEP)
        batch.call('setresgid', _KEEP, os.getegid(), _KEEP)
        _set_groups(batch, os.getgroups())
    first, second = struct.unpack('=2i', stub.do(batch).data(out))
    try:
        mine, theirs = _take_over(stub, first, second)
        return mine, theirs
    finally:
        batch = Batch()
        batch.call('close', first)
        batch.call('close', second)
        stub.do(batch)


def _set_groups(batch: Batch, groups: Sequence[int]) -> None:
    batch.call('setgroups', len(groups), batch.buffer(4 * len(groups) or 4, struct.pack(f'={len(groups)}I', *groups)))


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

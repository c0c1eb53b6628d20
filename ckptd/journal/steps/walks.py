# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that walks receive queues. It changes SO_PEEK_OFF of the sockets."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Annotated

import msgspec

from ckptd.journal.steps.base import Count, Moved, Pid, Step, StepContext
from ckptd.journal.steps.rights import as_maker
from ckptd.kernel.pidfd import open_process, pidfd_getfd
from ckptd.kernel.sockopt import SO_PEEK_OFF
from ckptd.kernel.tcp import set_peek_offset
from ckptd.kernel.unix_queue import sockets_below


class HeldSocket(msgspec.Struct, array_like=True, frozen=True):
    """A socket, identified by an fd of a process."""
    pid: Pid
    start_time: Count
    fd: Count


class PeekOffset(msgspec.Struct, array_like=True, frozen=True):
    """SO_PEEK_OFF of the socket with this inode."""
    inode: Count
    offset: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]


class WalkQueues(Step, frozen=True):
    """Receive queues of sockets that are walked with SO_PEEK_OFF. Undo: set the old offsets again.

    A socket that waits in the queue of another one is found through that one.
    """
    point = 'walk'
    by_user = True
    holders: tuple[HeldSocket, ...]
    offsets: tuple[PeekOffset, ...]
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()

    def describe(self) -> str:
        return f'walking the queues of {len(self.offsets)} sockets'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        as_maker(self, self._set_old_offsets)

    def _set_old_offsets(self) -> None:
        """Restore the old offsets of the sockets. A process that has exited, or has closed its socket, is skipped."""
        offsets = {one.inode: one.offset for one in self.offsets}
        for holder in self.holders:
            with suppress(ProcessLookupError), socket_of(holder) as held:
                if held:
                    _set_below(held, offsets)


@contextmanager
def socket_of(holder: HeldSocket) -> Iterator[socket.socket | None]:
    """Provide a held socket; None if the process has closed it. ProcessLookupError if it has exited."""
    pidfd = open_process(holder.pid, holder.start_time)
    try:
        fd = pidfd_getfd(pidfd, holder.fd)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
        yield None      # EBADF: closed meanwhile
        return
    finally:
        os.close(pidfd)
    try:
        sock = socket.socket(fileno=fd)
    except OSError:     # ENOTSOCK: the fd belongs to another file now
        os.close(fd)
        yield None
        return
    with sock:
        yield sock


def _set_below(held: socket.socket, offsets: dict[int, int]) -> None:
    for one in sockets_below(held, offsets):
        offset = offsets[os.fstat(one.fileno()).st_ino]
        if one.family != socket.AF_UNIX and one.type == socket.SOCK_STREAM:
            set_peek_offset(one, offset)
        else:
            one.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)

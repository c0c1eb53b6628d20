# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that holds TCP sockets in repair mode (TCP_REPAIR) while their queues are read. Only root can do that."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from ckptd.journal.steps.base import Moved, Step, StepContext
from ckptd.journal.steps.walks import HeldSocket
from ckptd.kernel.pidfd import open_process, pidfd_getfd
from ckptd.kernel.tcp import TCP_REPAIR, leave_repair


class RepairSockets(Step, frozen=True):
    """TCP sockets that may be in repair mode, where a write by the program would do harm. Undo: end that mode."""
    point = 'repair'
    before_thaw = True
    holders: tuple[HeldSocket, ...]

    def describe(self) -> str:
        return f'reading the send queues of {len(self.holders)} sockets'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        """Skip a process that has exited, or has closed its socket."""
        for holder in self.holders:
            with suppress(ProcessLookupError), _socket_of(holder) as sock:
                if sock and sock.proto == socket.IPPROTO_TCP and sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR):
                    leave_repair(sock)


@contextmanager
def _socket_of(holder: HeldSocket) -> Iterator[socket.socket | None]:
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore SO_PEEK_OFF, which walking the queue of a socket changes."""

import os
import socket
from contextlib import suppress

from ckptd.journal.steps import HeldSocket, WalkQueues
from ckptd.kernel.pidfd import open_process, pidfd_getfd
from ckptd.kernel.sockopt import SO_PEEK_OFF
from ckptd.kernel.unix_queue import sockets_below


def set_old_offsets(step: WalkQueues) -> None:
    """Restore the old offsets of the sockets. A process that has exited, or has closed its socket, is skipped."""
    offsets = {one.inode: one.offset for one in step.offsets}
    for holder in step.holders:
        with suppress(ProcessLookupError):
            _set_below(holder, offsets)


def _set_below(holder: HeldSocket, offsets: dict[int, int]) -> None:
    pidfd = open_process(holder.pid, holder.start_time)
    try:
        fd = pidfd_getfd(pidfd, holder.fd)
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
        return      # EBADF: closed meanwhile
    finally:
        os.close(pidfd)
    try:
        held = socket.socket(fileno=fd)
    except OSError:     # ENOTSOCK: the fd belongs to another file now
        os.close(fd)
        return
    with held:
        for one in sockets_below(held, offsets):
            one.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offsets[os.fstat(one.fileno()).st_ino])

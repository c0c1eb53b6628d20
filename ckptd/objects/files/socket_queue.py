# SPDX-License-Identifier: LGPL-2.1-or-later
"""The receive queue of a unix or UDP socket, read by MSG_PEEK."""

import socket

from ckptd.errors import CkptError
from ckptd.faults import fault
from ckptd.kernel import unix, unix_queue
from ckptd.kernel.sockopt import SO_PEEK_OFF
from ckptd.objects.files.base import OpenFile


def offset_to_restore(file: OpenFile) -> int | None:
    """Return SO_PEEK_OFF of a socket, which `read_queue` changes for a moment; None if there is nothing to read."""
    with file.as_socket() as sock:
        return unix_queue.peek_offset(sock) if _has_messages(sock) else None


def read_queue(file: OpenFile) -> list[unix_queue.Queued]:
    """Return the messages, with duplicates of attached files that the caller closes; none of a socket with a pending
    error, which reading would consume. CkptError."""
    with file.as_socket() as sock:
        before = unix_queue.peek_offset(sock)
        try:
            found = unix_queue.walk_queue(sock) if _has_messages(sock) else []
            fault('queue-walked')
        except unix_queue.MessagePassedOver as error:
            raise CkptError(f'{file.link} of process {file.pid}: an empty message waits in it that an earlier '
                            'checkpoint has marked', errno=error.errno, task=file.pid, resource=f'fd {file.fd}',
                            hint='try again when the program has received it') from error
        finally:
            sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)
    return found


def _has_messages(sock: socket.socket) -> bool:
    return not unix.has_error(sock) and not unix.is_empty(sock)

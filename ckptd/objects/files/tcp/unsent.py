# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes of a TCP connection within the tree that were sent and do not fit into the queue of the other end."""

import os
import socket
from contextlib import ExitStack

from ckptd.faults import fault
from ckptd.kernel import inet, tcp
from ckptd.kernel.inet import tcp_state
from ckptd.objects.files.base import OpenFile
from ckptd.objects.files.tcp.handshake import wait_until_sent
from ckptd.objects.files.tcp.keep import not_now

_PATIENCE = 1.0         # seconds in which the kernel delivers what is on its way


def read_unsent(file: OpenFile, sock: socket.socket, other: OpenFile, far: socket.socket) -> bytes:
    """Return the bytes that `file` has sent and `other` has not received. CkptError: only root can read them."""
    has_fin = tcp_state(sock).state in inet.HAVE_SENT_FIN      # which counts as a byte until it is acknowledged
    if wait_until_sent(sock, 0) <= has_fin:
        return b''
    try:
        if os.getpid() in (file.pid, other.pid):
            raise PermissionError       # in flight, where no journal finds a socket in repair mode
        with ExitStack() as stack:
            stack.enter_context(tcp.in_repair(sock))
            stack.enter_context(tcp.in_repair(far))
            fault('queue-in-repair')
            return tcp.peek_unsent(sock, tcp.sequence(far, tcp.TCP_RECV_QUEUE), has_fin=has_fin)
    except PermissionError as error:
        if (left := wait_until_sent(sock, _PATIENCE)) > has_fin:
            raise not_now(file, f'process {other.pid} has no room for {left:,} bytes that were sent to it, and only '
                          'root can read them') from error
    return b''

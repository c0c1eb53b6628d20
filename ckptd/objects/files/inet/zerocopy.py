# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sends without a copy (MSG_ZEROCOPY, Documentation/networking/msg_zerocopy.rst), of TCP connections and UDP sockets.

The kernel reports in the error queue when the program may use the memory of a send again. No restart can make such a
report, so none may be on its way.
"""

import socket
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.kernel import tcp, unix
from ckptd.kernel.sockopt import SO_ZEROCOPY
from ckptd.objects.files.base import OpenFile, finding


def zerocopy_findings(file: OpenFile, sock: socket.socket) -> Iterator[Finding]:
    """Yield the reasons why a socket cannot be dumped now, and what is lost."""
    if not sock.getsockopt(socket.SOL_SOCKET, SO_ZEROCOPY):
        return
    if unix.has_error(sock):
        yield finding('EAGAIN', f'{file.link} has unread notifications of MSG_ZEROCOPY, or a pending error',
                      'try again when the program has read them (MSG_ERRQUEUE of recv(2))')
    elif tcp.unsent(sock):
        yield finding('EAGAIN', f'{file.link} may have sends by MSG_ZEROCOPY that are not finished',
                      'try again when its peer has received them')
    else:
        yield finding('ENODATA', f'{file.link} uses MSG_ZEROCOPY, whose notifications are numbered',
                      'after a restart their numbers begin at 0 again', 'warning')

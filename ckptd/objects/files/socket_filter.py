# SPDX-License-Identifier: LGPL-2.1-or-later
"""The filter of a socket (socket(7), SO_ATTACH_FILTER and SO_LOCK_FILTER), of every family.

The kernel keeps the program as it was attached, so it is read and attached again. An eBPF program (SO_ATTACH_BPF)
cannot be read. A filter drops or shortens messages that arrive, so a restart attaches it behind the messages that wait
in the queue, and locks it then.
"""

import socket

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U8, Struct, layout
from ckptd.kernel.sockopt import SO_LOCK_FILTER, attach_filter, read_filter
from ckptd.objects.files.base import finding


@layout
class SocketFilter(Struct):
    """A classic filter, and whether it is locked. A socket without a filter can be locked, too."""
    program: bytes      # struct sock_filter of <linux/filter.h> in a row, b'' for none
    locked: U8          # SO_LOCK_FILTER: no process can replace it


NO_FILTER = SocketFilter(b'', 0)


def filter_findings(sock: socket.socket, what: str) -> list[Finding]:
    """Refuse a filter that cannot be read. what: the socket, 'a unix stream socket (socket:[5])'."""
    try:
        read_filter(sock)
    except PermissionError:
        return [finding('EOPNOTSUPP', f'{what} has an eBPF filter (SO_ATTACH_BPF), which no system call can read',
                        'detach it before the checkpoint (SO_DETACH_FILTER)')]
    return []


def dump_filter(sock: socket.socket) -> SocketFilter:
    return SocketFilter(read_filter(sock), bool(sock.getsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER)))


def set_filter(sock: socket.socket, saved: SocketFilter, link: str) -> None:
    """Attach and lock the filter. Call it when the queue is filled. CkptError if the kernel rejects it."""
    try:
        if saved.program:
            attach_filter(sock, saved.program)
        if saved.locked:
            sock.setsockopt(socket.SOL_SOCKET, SO_LOCK_FILTER, 1)
    except OSError as error:
        raise CkptError(f'{link}: its filter cannot be attached again: {error.strerror}', errno=error.errno,
                        resource=link, hint='raise the sysctl net.core.optmem_max if memory is short') from error

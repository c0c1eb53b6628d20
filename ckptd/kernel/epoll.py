# SPDX-License-Identifier: LGPL-2.1-or-later
"""epoll(7): an own instance as a plain fd, and what /proc shows of another process's."""

import os
import struct
from typing import NamedTuple

from ckptd.kernel.decl import c_int, libc

EPOLL_CLOEXEC = os.O_CLOEXEC
EPOLL_CTL_ADD = 1
_EVENT = struct.Struct('=IQ')       # struct epoll_event, packed on x86-64


@libc
def epoll_create1(flags: c_int) -> c_int: ...


def pack_event(events: int, data: int) -> bytes:
    """Pack a struct epoll_event."""
    return _EVENT.pack(events, data)


class EpollTarget(NamedTuple):
    """A file that an epoll instance watches."""
    tfd: int       # its fd in the table of the task that added it
    events: int    # EPOLL*
    data: int


def parse_target(row: str) -> EpollTarget:
    """Parse a tfd row of fdinfo: '       5 events:       19 data:                5  pos:0 ino:e6f sdev:d'."""
    tfd, _, events, _, data, *_ = row.split()
    return EpollTarget(int(tfd), int(events, 16), int(data, 16))

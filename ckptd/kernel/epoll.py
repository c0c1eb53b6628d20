# SPDX-License-Identifier: LGPL-2.1-or-later
"""epoll(7): an own instance as a plain fd, and what /proc shows of another process's."""

import fcntl
import os
import struct
from contextlib import suppress
from typing import NamedTuple

from ckptd.kernel.decl import IOR, IOW, c_int, libc

EPOLL_CLOEXEC = os.O_CLOEXEC
EPOLL_CTL_ADD = 1
_EVENT = struct.Struct('=IQ')       # struct epoll_event, packed on x86-64
_PARAMS = struct.Struct('=IHBB')    # struct epoll_params of <linux/eventpoll.h>, since 6.9; the last member is 0
EPIOCSPARAMS, EPIOCGPARAMS = IOW('\x8a', 1, _PARAMS.size), IOR('\x8a', 2, _PARAMS.size)


@libc
def epoll_create1(flags: c_int) -> c_int: ...


def pack_event(events: int, data: int) -> bytes:
    """Pack a struct epoll_event."""
    return _EVENT.pack(events, data)


class BusyPoll(NamedTuple):
    """Parameters by which epoll_wait(2) polls network devices itself (ioctl_eventpoll(2)). All are 0 in a new
    instance."""
    usecs: int      # microseconds
    budget: int     # packets
    prefer: int     # 1: the device raises no interrupts meanwhile


def read_busy_poll(fd: int) -> BusyPoll:
    """Return the parameters of an instance; zeros before Linux 6.9, and without CONFIG_NET_RX_BUSY_POLL."""
    with suppress(OSError):
        usecs, budget, prefer, _ = _PARAMS.unpack(fcntl.ioctl(fd, EPIOCGPARAMS, bytes(_PARAMS.size)))
        return BusyPoll(usecs, budget, prefer)
    return BusyPoll(0, 0, 0)


def set_busy_poll(fd: int, wanted: BusyPoll) -> None:
    """Set the parameters. PermissionError for a budget above 64 without CAP_NET_ADMIN."""
    fcntl.ioctl(fd, EPIOCSPARAMS, _PARAMS.pack(*wanted, 0))


class EpollTarget(NamedTuple):
    """A file that an epoll instance watches."""
    tfd: int       # its fd in the table of the task that added it
    events: int    # EPOLL*
    data: int


def parse_target(row: str) -> EpollTarget:
    """Parse a tfd row of fdinfo: '       5 events:       19 data:                5  pos:0 ino:e6f sdev:d'."""
    tfd, _, events, _, data, *_ = row.split()
    return EpollTarget(int(tfd), int(events, 16), int(data, 16))

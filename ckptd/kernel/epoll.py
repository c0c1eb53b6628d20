# SPDX-License-Identifier: LGPL-2.1-or-later
"""epoll(7): an own instance as a plain fd, and what /proc shows of another process's."""

import fcntl
import os
import select
import struct
from contextlib import suppress
from typing import NamedTuple

from ckptd.kernel.decl import IOR, IOW, c_int, c_void_p, libc

EPOLL_CLOEXEC = os.O_CLOEXEC
EPOLL_CTL_ADD, EPOLL_CTL_MOD = 1, 3
EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET = 1 << 28, 1 << 29, 1 << 30, 1 << 31
PRIVATE_BITS = EPOLLEXCLUSIVE | EPOLLWAKEUP | EPOLLONESHOT | EPOLLET    # fs/eventpoll.c, EP_PRIVATE_BITS
POLL_BITS = 0x7FFF      # events of struct pollfd (poll(2)), which is a short
_EVENT = struct.Struct('=IQ')       # struct epoll_event, packed on x86-64
_PARAMS = struct.Struct('=IHBB')    # struct epoll_params of <linux/eventpoll.h>, since 6.9; the last member is 0
EPIOCSPARAMS, EPIOCGPARAMS = IOW('\x8a', 1, _PARAMS.size), IOR('\x8a', 2, _PARAMS.size)


@libc
def epoll_create1(flags: c_int) -> c_int: ...


@libc
def _epoll_ctl(epfd: c_int, op: c_int, fd: c_int, event: c_void_p) -> c_int: ...


def epoll_ctl(epoll: int, op: int, fd: int, events: int, data: int) -> None:
    """Watch a file, or change how. The kernel clears EPOLLWAKEUP without CAP_BLOCK_SUSPEND. OSError."""
    _epoll_ctl(epoll, op, fd, _EVENT.pack(events, data))


def ready_events(fd: int, events: int) -> int:
    """Return those of the events (EPOLL*, without the bits above POLL_BITS) that a file has now, with POLLERR and
    POLLHUP."""
    waiting = select.poll()
    waiting.register(fd, events & POLL_BITS)
    return next((found for _, found in waiting.poll(0)), 0)


def take_ready(epoll: int, count: int) -> None:
    """Take note of everything that is ready (epoll_wait(2)): edges are not reported again, and one-shot entries are
    disarmed. count: of entries at least."""
    with select.epoll.fromfd(os.dup(epoll)) as waiting:
        waiting.poll(0, count)


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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The watchdog of a unit (WatchdogSec= of systemd.service(5)).

systemd ends a service whose main process does not send WATCHDOG=1 in time, also one that is frozen. Another process may
send it with the credentials of the main process if it has CAP_SYS_ADMIN (unix(7)). It does so while the main process is
stopped, and only then, so that a service that hangs by itself is still found.

Without that right a tree may be stopped for half of the time: a service sends twice as often as it has to
(sd_watchdog_enabled(3)).
"""

import math
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ckptd.errors import FreezeTimeout, NotSupported
from ckptd.kernel.cgroup import Cgroup
from ckptd.kernel.creds import CAP_SYS_ADMIN, capget
from ckptd.kernel.fork import quiet_fork, run_and_exit
from ckptd.kernel.pidfd import pidfd_open
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.unix import UCRED
from ckptd.protocol.requests import CheckpointRequest, FreezerRequest, HoldRequest, Request

NOTIFY = '/run/systemd/notify'      # of the system's manager
OFTEN = 4                           # messages in the time of a watchdog


def is_fed(request: FreezerRequest) -> bool:
    """Whether this process, or the broker of this worker, may feed the watchdog."""
    return request.brokered or bool(capget().effective >> CAP_SYS_ADMIN & 1)


@contextmanager
def feeding(request: Request) -> Iterator[None]:
    """Feed the watchdog of the unit that the job stops, by a child process. NotSupported if that is not possible and
    the tree stays frozen when the job is done."""
    if not isinstance(request, CheckpointRequest | HoldRequest) or not request.unit.watchdog_usec or request.brokered:
        yield       # there is none, or the broker does it
        return
    if not is_fed(request):
        if isinstance(request, HoldRequest) or request.after == 'freeze':
            raise NotSupported(f'the watchdog of {request.target} ({_seconds(request)}) would end it while it is '
                               'frozen', resource='WatchdogSec', hint="only root's ckptd feeds watchdogs")
        yield
        return
    end, ours = os.pipe()       # readable when this process has ended
    child = quiet_fork()
    if child == 0:
        os.close(ours)
        run_and_exit(lambda: _feed(request.unit.main_pid, request.unit.watchdog_usec / 1e6 / OFTEN, end))
    os.close(end)
    try:
        yield
    finally:
        os.close(ours)
        os.waitpid(child, 0)


def _feed(main: int, interval: float, end: int) -> None:
    """Send WATCHDOG=1 for the main process while it is stopped, until `end` is readable or the process has ended."""
    with suppress(ProcessLookupError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        poll = select.poll()
        for fd in (end, pidfd_open(main)):
            poll.register(fd, select.POLLIN)
        status = read_status(main)
        credentials = UCRED.pack(main, status.uids[0], status.gids[0])
        sock.connect(NOTIFY)
        while not poll.poll(interval * 1000):
            if _is_stopped(main):
                with suppress(BlockingIOError):     # systemd has not read the earlier ones yet
                    sock.sendmsg([b'WATCHDOG=1'], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by its tracer or frozen."""
    with suppress(FileNotFoundError):       # no mount shows its cgroup
        return read_stat(pid).state == 't' or Cgroup.of(pid).frozen
    return False


class StopLimit:
    """The time for which a tree may be stopped, from now on."""

    def __init__(self, request: FreezerRequest) -> None:
        self._request = request
        limited = request.unit.watchdog_usec and not is_fed(request)
        self._end = time.monotonic() + request.unit.watchdog_usec / 2e6 if limited else math.inf

    def check(self) -> None:
        """Check that the watchdog is not near. FreezeTimeout."""
        if time.monotonic() >= self._end:
            raise FreezeTimeout(f'{self._request.target} cannot be stopped for longer: half of the time of its watchdog'
                                f' ({_seconds(self._request)}) has passed', resource='WatchdogSec',
                                hint="give it a longer WatchdogSec=, or use root's ckptd, which feeds watchdogs")


def _seconds(request: FreezerRequest) -> str:
    return f'WatchdogSec={request.unit.watchdog_usec / 1e6:g}s'

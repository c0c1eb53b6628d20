# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that keeps the terminal of a tree open when ckptctl dies. The kernel hangs up a terminal whose last master
is closed, and SIGHUP then ends most programs (pty(7)).

    ckptctl lives       it waits
    ckptctl has died    it reads what the tree writes, and drops it, until the tree has closed the terminal
"""

import os
import select
import signal
from contextlib import suppress

from ckptd.kernel.fork import quiet_fork, run_and_exit

_CHUNK = 1 << 16
_IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGTSTP, signal.SIGWINCH)


class Keeper:
    """The process. `close` ends it if the tree has closed the terminal."""

    def __init__(self, master: int) -> None:
        self._master = master
        theirs, self._alive = os.pipe()
        self._pid = quiet_fork()
        if self._pid == 0:
            run_and_exit(lambda: _keep(master, theirs, self._alive))
        os.close(theirs)

    def close(self, *, is_ours: bool) -> None:
        """End the process, unless a tree has the terminal open. It is left to itself then. is_ours: no tree has got the
        terminal."""
        if is_ours or not is_open(self._master):
            os.write(self._alive, b'.')
            os.waitpid(self._pid, 0)
        os.close(self._alive)


def is_open(master: int) -> bool:
    """Whether any process has the slave open."""
    poll = select.poll()
    poll.register(master, 0)
    return not any(events & select.POLLHUP for _, events in poll.poll(0))


def _keep(master: int, ckptctl: int, theirs: int) -> None:
    """Wait for the end of ckptctl, as a session of its own, which the user's terminal does not end."""
    os.close(theirs)
    os.setsid()
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.chdir('/')
    _close_all_but(master, ckptctl)
    if os.read(ckptctl, 1):
        return
    os.set_blocking(master, True)
    with suppress(OSError):     # EIO: the terminal is closed
        while os.read(master, _CHUNK):
            pass


def _close_all_but(*kept: int) -> None:
    low = 0
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf('SC_OPEN_MAX'))

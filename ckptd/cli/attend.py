# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in the foreground for a restored tree: pass on signals to its root and connect it to the terminal.

    SIGINT SIGTERM SIGHUP SIGQUIT SIGUSR1 SIGUSR2     passed on to the root
    SIGTSTP, SIGCONT                                  the root and this command stop, and go on

The end of this command does not end the tree. A process of its own then keeps the tree's terminal open (keeper.py).
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from ckptd.bus.message import UnixFd
from ckptd.cli.session import Interrupts
from ckptd.cli.terminal import Terminal

PASSED_ON = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Attendance:
    """A connection to a restored tree. Until `begin`, which is called once the tree runs, signals have their usual
    effect.

    begun: called with the root's pid when signals begin to go to it, before the terminal becomes the tree's.
    """

    def __init__(self, interrupts: Interrupts, begun: Callable[[int], None]) -> None:
        self._interrupts, self._begun = interrupts, begun
        self._loop = asyncio.get_running_loop()
        self._pidfd = -1
        self._terminal: Terminal | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._undo.close()

    def prepare(self) -> dict[str, Any]:
        """Return options for Restore: a terminal for the tree, if this command has one."""
        if not os.isatty(0):
            return {}
        self._terminal = self._undo.enter_context(Terminal())
        return {'terminal': UnixFd(self._terminal.slave)}

    @property
    def has_terminal(self) -> bool:
        """Whether the tree gets a terminal."""
        return self._terminal is not None

    def begin(self, root: int) -> None:
        """Begin: the tree runs and its root is the process `root`. A second call does nothing."""
        if self._pidfd >= 0:
            return
        try:
            self._pidfd = os.pidfd_open(root)
        except ProcessLookupError:      # it has ended, and the message about that is on its way
            return
        self._undo.callback(os.close, self._pidfd)
        self._undo.callback(setattr, self._interrupts, 'taker', None)
        self._interrupts.taker = self._pass_on
        for number, handler in ((signal.SIGTSTP, self._stop), (signal.SIGCONT, self._continue),
                                *((number, self._pass_on) for number in PASSED_ON)):
            self._loop.add_signal_handler(number, handler, number)
            self._undo.callback(self._loop.remove_signal_handler, number)
        self._begun(root)
        if self._terminal is not None:
            self._terminal.begin()

    def _pass_on(self, number: signal.Signals) -> bool:
        """Send a signal to the root. Return False if it has ended or belongs to another user now (setuid)."""
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _stop(self, number: signal.Signals) -> None:
        # The root's process group is orphaned, and the kernel drops SIGTSTP for those (setpgid(2), signal(7)).
        self._pass_on(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _continue(self, number: signal.Signals) -> None:
        self._pass_on(number)

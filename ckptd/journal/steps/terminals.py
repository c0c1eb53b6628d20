# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that takes out what waits in a pseudo-terminal, which nobody can look at otherwise."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated

import msgspec

from ckptd.journal.steps.base import Count, Moved, Pid, Step, StepContext
from ckptd.journal.steps.rights import as_maker
from ckptd.kernel import tty
from ckptd.kernel.pidfd import open_process, pidfd_getfd
from ckptd.kernel.tty_queue import Waiting, put_back

_PTMX = os.makedev(5, 2)
Data = Annotated[bytes, msgspec.Meta(max_length=1 << 17)]


class TakeFromTerminal(Step, frozen=True):
    """A pseudo-terminal whose settings are changed for a moment, and whose data is taken out. It is written down before
    that, and again with the data (is_taken). Undo: set the settings, and put the data back.

    The master is `fd` of the process.
    """
    point = 'take'
    by_user = True
    pid: Pid
    start_time: Count
    fd: Count
    number: Count                       # N of /dev/pts/N
    settings: Annotated[bytes, msgspec.Meta(max_length=tty.TERMIOS_SIZE)]
    is_taken: bool = False
    output: Data = b''                  # see Waiting, as for the next ones
    lines: tuple[Data, ...] = ()
    events: Count = 0
    stopped: bool = False
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()

    def with_data(self, waiting: Waiting) -> 'TakeFromTerminal':
        return msgspec.structs.replace(self, is_taken=True, **waiting._asdict())

    def describe(self) -> str:
        return f'taking out what waits in terminal {self.number}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        as_maker(self, self._put_back)

    def _put_back(self) -> None:
        """Do nothing if the process has exited, or has closed the terminal."""
        with suppress(ProcessLookupError):
            pidfd = open_process(self.pid, self.start_time)
            try:
                master = pidfd_getfd(pidfd, self.fd)
            except OSError as error:
                if isinstance(error, PermissionError):
                    raise
                return
            finally:
                os.close(pidfd)
            try:
                self._put_into(master)
            finally:
                os.close(master)

    def _put_into(self, master: int) -> None:
        if os.fstat(master).st_rdev != _PTMX or tty.peer_number(master) != self.number:
            return
        tty.set_settings(master, self.settings)
        if self.is_taken:
            put_back(master, Waiting(self.output, self.lines, self.events, self.stopped))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that ends a tree after its checkpoint."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from ckptd.journal.steps.base import EMPTY_SECONDS, Count, Moved, Pid, Step, StepContext
from ckptd.kernel.pidfd import open_process, pidfd_send_signal, wait_dead


class Known(msgspec.Struct, array_like=True, frozen=True):
    """A process, identified by pid and start time."""
    pid: Pid
    start_time: Count


class EndProcesses(Step, frozen=True):
    """End all processes of a tree whose image is published. The step is undone by ending those that are left."""
    point = 'end'
    ends_tree = True
    processes: tuple[Known, ...]

    def describe(self) -> str:
        return f'ending {len(self.processes)} processes'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        """Kill all processes, then wait until they are dead."""
        for process in self.processes:
            _with_pidfd(process, lambda pidfd: pidfd_send_signal(pidfd, signal.SIGKILL))
        deadline = time.monotonic() + EMPTY_SECONDS
        for process in self.processes:
            _with_pidfd(process, lambda pidfd: wait_dead(pidfd, deadline - time.monotonic()))


def _with_pidfd(process: Known, work: Callable[[int], object]) -> None:
    """Do the work with a pidfd of a process. Do nothing if it has exited."""
    with suppress(ProcessLookupError):
        pidfd = open_process(process.pid, process.start_time)
        try:
            work(pidfd)
        finally:
            os.close(pidfd)

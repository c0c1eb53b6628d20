# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps that end a tree after its checkpoint."""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import msgspec

from ckptd.journal.steps.base import EMPTY_SECONDS, Count, Moved, Pid, Step, StepContext
from ckptd.journal.steps.rights import as_maker
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
        _end(self.processes)


class EndUsersProcesses(Step, frozen=True):
    """End processes of a user that their worker has stopped by ptrace, likewise. They are free while the worker is
    dead, so the kernel decides which of them are still the user's."""
    point = 'end-users'
    by_user = True
    ends_tree = True
    processes: tuple[Known, ...]
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()

    def describe(self) -> str:
        return f'ending {len(self.processes)} processes of uid {self.uid}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        as_maker(self, lambda: _end(self.processes))


def _end(processes: Sequence[Known]) -> None:
    """Kill all processes, then wait until they are dead. Those that may not be killed are another user's now."""
    ended = []
    for process in processes:
        with suppress(PermissionError):
            _with_pidfd(process, lambda pidfd: pidfd_send_signal(pidfd, signal.SIGKILL))
            ended.append(process)
    deadline = time.monotonic() + EMPTY_SECONDS
    for process in ended:
        _with_pidfd(process, lambda pidfd: wait_dead(pidfd, deadline - time.monotonic()))


def _with_pidfd(process: Known, work: Callable[[int], object]) -> None:
    """Do the work with a pidfd of a process. Do nothing if it has exited."""
    with suppress(ProcessLookupError):
        pidfd = open_process(process.pid, process.start_time)
        try:
            work(pidfd)
        finally:
            os.close(pidfd)

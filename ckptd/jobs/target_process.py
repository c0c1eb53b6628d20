# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process of a ProcessTarget. Once it has ended, its pid may be reused."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Self

from ckptd.errors import NoSuchTarget
from ckptd.kernel.pidfd import pidfd_open, pidfd_start_time
from ckptd.target import ProcessTarget, Target


class ProcessWatch:
    """A watch of one process. on_end: called once when the process ends, unless `close` comes first."""

    def __init__(self, pidfd: int, on_end: Callable[[], None]) -> None:
        self._pidfd, self._on_end = pidfd, on_end
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._end)

    @classmethod
    def of(cls, target: Target, start_time: int, on_end: Callable[[], None]) -> Self | None:
        """Watch the process of a target. None if the target is not a process. start_time: of
        the expected process, from /proc/PID/stat; 0 for any. NoSuchTarget if that process has ended."""
        if not isinstance(target, ProcessTarget):
            return None
        with contextlib.ExitStack() as undo:
            try:
                pidfd = pidfd_open(target.pid)
                undo.callback(os.close, pidfd)
                if start_time in (0, pidfd_start_time(pidfd, target.pid)):
                    undo.pop_all()
                    return cls(pidfd, on_end)
            except OSError:     # ESRCH; EINVAL or ENOENT for the tid of a thread
                pass
        raise NoSuchTarget(f'process {target.pid} has ended', resource=str(target))

    def close(self) -> None:
        """End the watch. A second call does nothing."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _end(self) -> None:
        self.close()
        self._on_end()

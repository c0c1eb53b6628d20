# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fds that the stubs inherit: everything that tasks are made from is opened here first, above all fds that the tasks
use.

    0 .. base-1     the final fds of a task
    base ..         service fds; each task duplicates the files that it needs, and then closes the rest at once
"""

import fcntl
import os
import resource
from collections.abc import Callable, Hashable
from typing import Self

from ckptd.errors import LimitsExceeded

_LEAST = 64


class ServiceFds:
    """Owner of the service fds; `with` closes them. They are not close-on-exec, because the bootstrap is a program of
    its own."""

    def __init__(self, highest: int) -> None:
        self.base = max(highest + 1, _LEAST)
        self._fds: set[int] = set()
        self._known: dict[Hashable, int] = {}

    def __enter__(self) -> Self:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all. Nothing can be made from them afterwards."""
        while self._fds:
            os.close(self._fds.pop())
        self._known.clear()

    def add(self, fd: int) -> int:
        """Move an fd to the service fds. Return its number there."""
        try:
            kept = fcntl.fcntl(fd, fcntl.F_DUPFD, self.base)
        except OSError as error:
            raise LimitsExceeded(f'{len(self._fds)} open files and more at a time, from number {self.base} on:'
                                 f' {error.strerror}', errno=error.errno, resource='RLIMIT_NOFILE',
                                 hint='raise the limit of ckptd (LimitNOFILE= of its unit, ulimit -Hn)') from error
        finally:
            os.close(fd)
        self._fds.add(kept)
        return kept

    def find(self, key: Hashable) -> int:
        """Return the fd of this key; -1 if it was not made."""
        return self._known.get(key, -1)

    def once(self, key: Hashable, make: Callable[[], int]) -> int:
        """Return the fd of this key. The first call makes it."""
        if key not in self._known:
            self._known[key] = self.add(make())
        return self._known[key]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Readers of /proc/timer_list, which only root may open: the worker's own, or the broker for a user's worker."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from ckptd.kernel.timer_list import End, read_sleeps


class Timers(Protocol):
    """A reader of /proc/timer_list, for tasks that sleep in between. PermissionError, FileNotFoundError."""

    def at_rest(self) -> None:
        """Read the list while none of the tasks sleeps."""

    def asleep(self, tids: Sequence[int]) -> None:
        """Read the list while these tasks sleep."""

    def ends(self) -> set[End]:
        """Read the list when the tasks have stopped again. Return ends that it had while they slept, and neither before
        nor after."""


class OwnTimers:
    """A reader that opens the list itself, as root."""

    def __init__(self) -> None:
        self._before: Counter[End] = Counter()
        self._asleep: Counter[End] = Counter()

    def at_rest(self) -> None:
        self._before = read_sleeps()

    def asleep(self, tids: Sequence[int]) -> None:
        self._asleep = read_sleeps()

    def ends(self) -> set[End]:
        before, self._before = self._before, read_sleeps()
        return {end for end in self._asleep - before if self._before[end] < self._asleep[end]}

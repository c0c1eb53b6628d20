# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limit the rate of a call. The last call is always made."""

import asyncio
from collections.abc import Callable


class Throttle:
    """A rate limit for `emit`: it is called at once if allowed, else later. Pokes in between are joined into one
    call."""

    def __init__(self, interval: float, emit: Callable[[], None]) -> None:
        self._interval, self._emit = interval, emit
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def poke(self) -> None:
        """Request a call."""
        if self._timer is not None:
            return
        if self._loop.time() >= self._next:
            self._fire()
        else:
            self._timer = self._loop.call_at(self._next, self._fire)

    def flush(self) -> None:
        """Make a pending call now, if there is one."""
        if self._timer is not None:
            self._fire()

    def _fire(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next = self._loop.time() + self._interval
        self._emit()

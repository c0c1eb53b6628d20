# SPDX-License-Identifier: LGPL-2.1-or-later
"""At most so many calls a second, and the last one always."""

import asyncio
from collections.abc import Callable


class Throttle:
    """Calls `emit` at once if it may, later if it is too early; pokes in between are one call."""

    def __init__(self, interval: float, emit: Callable[[], None]) -> None:
        self._interval, self._emit = interval, emit
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def poke(self) -> None:
        """There is something new to tell."""
        if self._timer is not None:
            return
        if self._loop.time() >= self._next:
            self._fire()
        else:
            self._timer = self._loop.call_at(self._next, self._fire)

    def flush(self) -> None:
        """Tell now what waits, if anything does."""
        if self._timer is not None:
            self._fire()

    def _fire(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next = self._loop.time() + self._interval
        self._emit()

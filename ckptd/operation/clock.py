# SPDX-License-Identifier: LGPL-2.1-or-later
"""The time that each part of a job takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Time spent in each part, by name."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._spent: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._spent[name] = self._spent.get(name, 0.0) + time.monotonic() - begin

    def usec(self, name: str) -> int:
        return round(self._spent.get(name, 0.0) * 1e6)

    def total_usec(self) -> int:
        return round((time.monotonic() - self._start) * 1e6)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Places to work in, given out in turn: to one user after the other, and to each in the order of his requests."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator

from ckptd.config import Config
from ckptd.protocol.messages import JobRequest


class Slots:
    """Some places. A user with a thousand requests delays another one's by one at most. each: places that one user may
    have at a time; root has as many as there are."""

    def __init__(self, places: int, each: int) -> None:
        self._free, self._each = places, each
        self._used: Counter[int] = Counter()
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}      # by uid, who is next first

    @contextlib.asynccontextmanager
    async def place(self, uid: int) -> AsyncIterator[None]:
        """One for the length of a block."""
        await self.acquire(uid)
        try:
            yield
        finally:
            self.release(uid)

    async def acquire(self, uid: int) -> None:
        """Wait for a place; `release` gives it back."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(place)
        self._give()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():      # it was given the place in the same moment
                self.release(uid)
            else:
                self._forget(uid, place)
            raise

    def release(self, uid: int) -> None:
        self._free += 1
        self._used[uid] -= 1
        if not self._used[uid]:
            del self._used[uid]
        self._give()

    def _give(self) -> None:
        while self._free > 0 and (uid := self._next()) is not None:
            places = self._waiting.pop(uid)
            place = places.popleft()
            if places:
                self._waiting[uid] = places     # behind all others
            if not place.done():
                self._free -= 1
                self._used[uid] += 1
                place.set_result(None)

    def _next(self) -> int | None:
        return next((uid for uid in self._waiting if not uid or self._used[uid] < self._each), None)

    def _forget(self, uid: int, place: asyncio.Future[None]) -> None:
        places = self._waiting.get(uid, deque())
        if place in places:
            places.remove(place)
        if not places:
            self._waiting.pop(uid, None)


class SlotGroups:
    """A long dump does not hold up a quick scan. Nor does who copies for somebody slow: of streams all may have their
    places at a time, so that a user who does not read or write holds up himself alone."""

    def __init__(self, config: Config) -> None:
        each = max(1, config.max_jobs - 1)      # one place is never the same user's as all others
        self._jobs, self._questions = Slots(config.max_jobs, each), Slots(config.max_jobs, each)
        self._streams = Slots(config.max_queued_jobs, each)

    def of(self, request: JobRequest, announced: bool) -> Slots:
        if request.operation in ('export', 'import'):
            return self._streams
        return self._jobs if announced else self._questions

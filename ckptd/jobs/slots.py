# SPDX-License-Identifier: LGPL-2.1-or-later
"""Slots for work, given to users in turn, and to each user in the order of the requests."""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator

from ckptd.config import Config
from ckptd.protocol.requests import JobRequest


class Slots:
    """A number of slots. A user with a thousand requests delays another user's request by at most one.

    each: slots that one user may hold at a time. Root may hold all.
    """

    def __init__(self, slots: int, each: int) -> None:
        self._free, self._each = slots, each
        self._used: Counter[int] = Counter()
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}      # by uid; the uid whose turn it is comes first

    @contextlib.asynccontextmanager
    async def slot(self, uid: int) -> AsyncIterator[None]:
        """Hold a slot for the length of a block."""
        await self.acquire(uid)
        try:
            yield
        finally:
            self.release(uid)

    async def acquire(self, uid: int) -> None:
        """Wait for a slot; `release` gives it back."""
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(slot)
        self._give()
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():      # it was given the slot at the same moment
                self.release(uid)
            else:
                self._forget(uid, slot)
            raise

    def release(self, uid: int) -> None:
        self._free += 1
        self._used[uid] -= 1
        if not self._used[uid]:
            del self._used[uid]
        self._give()

    def _give(self) -> None:
        while self._free > 0 and (uid := self._next()) is not None:
            slots = self._waiting.pop(uid)
            slot = slots.popleft()
            if slots:
                self._waiting[uid] = slots     # behind all others
            if not slot.done():
                self._free -= 1
                self._used[uid] += 1
                slot.set_result(None)

    def _next(self) -> int | None:
        return next((uid for uid in self._waiting if not uid or self._used[uid] < self._each), None)

    def _forget(self, uid: int, slot: asyncio.Future[None]) -> None:
        slots = self._waiting.get(uid, deque())
        if slot in slots:
            slots.remove(slot)
        if not slots:
            self._waiting.pop(uid, None)


class SlotGroups:
    """Groups of slots, so that a long dump does not delay a quick scan.

    All users may have slots for streams at the same time, so that a user who does not read or write delays only
    themselves.
    """

    def __init__(self, config: Config) -> None:
        each = max(1, config.max_jobs - 1)      # one slot is always left for another user
        self._jobs, self._questions = Slots(config.max_jobs, each), Slots(config.max_jobs, each)
        self._streams = Slots(config.max_queued_jobs, each)

    def of(self, request: JobRequest, announced: bool) -> Slots:
        if request.operation in ('export', 'import'):
            return self._streams
        return self._jobs if announced else self._questions

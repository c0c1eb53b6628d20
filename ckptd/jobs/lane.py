# SPDX-License-Identifier: LGPL-2.1-or-later
"""Places to work in, given out in turn: to one user after the other, and to each in the order of his requests."""

import asyncio
from collections import deque

from ckptd.engine.messages import JobRequest

LANES = ('jobs', 'questions', 'streams')


def lane_of(request: JobRequest, announced: bool) -> str:
    """Who only copies for somebody who may be slow keeps nobody from a checkpoint, and that nobody from an answer."""
    if request.operation in ('export', 'import'):
        return 'streams'
    return 'jobs' if announced else 'questions'


class Lane:
    """Some places. A user with a thousand requests delays another one's by one at most."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[int, deque[asyncio.Future[None]]] = {}      # by uid, who is next first

    async def acquire(self, uid: int) -> None:
        """Wait for a place; `release` gives it back."""
        if self._free > 0 and not self._waiting:
            self._free -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(uid, deque()).append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():      # it was given the place in the same moment
                self.release()
            else:
                self._forget(uid, place)
            raise

    def release(self) -> None:
        self._free += 1
        while self._free > 0 and self._waiting:
            uid, places = next(iter(self._waiting.items()))
            place = places.popleft()
            del self._waiting[uid]
            if places:
                self._waiting[uid] = places     # behind all others
            if not place.done():
                self._free -= 1
                place.set_result(None)

    def _forget(self, uid: int, place: asyncio.Future[None]) -> None:
        places = self._waiting.get(uid, deque())
        if place in places:
            places.remove(place)
        if not places:
            self._waiting.pop(uid, None)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Queues that are served in turn, so that no user waits behind everything that another has queued. Pure."""

from collections import Counter, deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar('T')
Key = int | str     # owner of a queue: a uid, or a connection whose uid is unknown; '' for ckptd


class Turns(Generic[T]):
    """Queues served in turn. count: number of all items. size: sum of the sizes given with them."""

    def __init__(self) -> None:
        self._queues: dict[Key, deque[tuple[T, int]]] = {}      # the queue whose turn it is comes first
        self._sizes: Counter[Key] = Counter()
        self.count = self.size = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._queues

    def size_of(self, key: Key) -> int:
        return self._sizes[key]

    def put(self, key: Key, item: T, size: int) -> None:
        self._queues.setdefault(key, deque()).append((item, size))
        self._sizes[key] += size
        self.count, self.size = self.count + 1, self.size + size

    def take_all(self, key: Key) -> list[T]:
        """Remove and return the items of one queue."""
        items = self._queues.pop(key, ())
        size = self._sizes.pop(key, 0)
        self.count, self.size = self.count - len(items), self.size - size
        return [item for item, _ in items]

    def take(self, may: Callable[[Key], bool] = lambda key: True) -> T | None:
        """Return the first item of the queue whose turn it is; None when all are empty. may: whether a queue has turns
        now."""
        key = next(filter(may, self._queues), None)
        if key is None:
            return None
        queue = self._queues.pop(key)
        item, size = queue.popleft()
        self._sizes[key] -= size
        self.count, self.size = self.count - 1, self.size - size
        if queue:
            self._queues[key] = queue       # behind all others
        else:
            del self._sizes[key]
        return item

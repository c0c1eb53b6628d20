# SPDX-License-Identifier: LGPL-2.1-or-later
"""asyncio tasks with an owner: no task is lost, fails silently, or outlives the daemon."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Tasks:
    """A set of running tasks, to be made inside a running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, coro: Coroutine[Any, Any, None], *, name: str | None = None) -> asyncio.Task[None]:
        task = self._loop.create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error('%s failed', task.get_name(), exc_info=task.exception())

    async def drain(self, patience: float, hurry: Callable[[], None]) -> None:
        """Wait for all tasks to end. After `patience` seconds call `hurry`; after as many again cancel the rest."""
        for last_resort in (hurry, self._cancel, None):
            await self._wait(patience)
            if self._tasks and last_resort is not None:
                last_resort()

    async def _wait(self, patience: float) -> None:
        end = self._loop.time() + patience
        # a task may start another one at its end
        while self._tasks and (left := end - self._loop.time()) > 0:
            await asyncio.wait(set(self._tasks), timeout=left)

    def _cancel(self) -> None:
        for task in self._tasks:
            log.error('%s does not end', task.get_name())
            task.cancel()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recovery after a worker or a daemon died: thaw the targets in the journal, remove unpublished images, put files back.

An entry of a dead worker may be locked for a while: a child that the worker forked holds its locks, too, and a worker
of an earlier daemon may still be releasing its tree. Such an entry stays, and is recovered as soon as the lock is free.
"""

import asyncio
import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from ckptd import flock
from ckptd.errors import CkptError
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.run import Units
from ckptd.jobs.spool import Spool
from ckptd.journal import Journal, recover
from ckptd.journal.recover import left_about_files
from ckptd.protocol.messages import Failed, Finished, Start
from ckptd.protocol.requests import Caller, RecoverRequest

log = logging.getLogger(__name__)

FREEZING = frozenset({'checkpoint', 'freeze', 'restore'})      # operations that may leave freezes in the journal

LOCK_PATIENCE = 2.0         # seconds that the end of a job waits for locks left by its dead worker
FREEZE_TIMEOUT = 10.0       # seconds, for a unit that a job had thawed and that must be frozen again


class Recovery:
    """Recovery, one at a time, in a thread: cgroup files and a slow disk must not stop the daemon's loop."""

    def __init__(self, runtime: Path, spool: Spool, units: Units | None, pool: WorkerPool) -> None:
        self._runtime, self._spool, self._units, self._pool = runtime, spool, units, pool
        self._turn = asyncio.Lock()
        self._locked: dict[Path, asyncio.Future[None]] = {}     # one thread waits for each
        self.waiting: set[asyncio.Task[None]] = set()           # at most one; cancelled when the daemon stops
        self.spawn: Callable[..., asyncio.Task[None]]           # spawn of the owner of all tasks

    async def run(self, patience: float = LOCK_PATIENCE) -> None:
        """Recover everything that is not locked. Wait for locks up to `patience` seconds here, and then in a task.

        This never fails. An error is logged, and the next recovery tries again.
        """
        if not await self._run(patience) and not self.waiting:
            task = self.spawn(self._wait(), name='recovery of what is locked')
            self.waiting.add(task)
            task.add_done_callback(self.waiting.discard)

    async def _wait(self) -> None:
        await self._run(math.inf)

    async def _run(self, patience: float) -> bool:
        """Recover now, and again whenever a lock is released, for `patience` seconds. Return whether all locks of dead
        workers are free."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while True:
            async with self._turn:
                waited, before = dict(self._locked), await self._find_locked()
                await self._run_once()
                after = await self._find_locked()
            if before is None or after is None:
                return True     # A directory cannot be read, which was logged. The next recovery may find the entries.
            # These were released meanwhile, perhaps too late to be recovered. One of our threads holds each of them for
            # a moment.
            if freed := (waited.keys() | before.keys()) - after.keys():
                if told := [waited[path] for path in freed & waited.keys()]:
                    await asyncio.wait(told)
                continue
            dead = self._of_the_dead(after)
            if not dead:
                return True
            left = end - loop.time()
            if left <= 0:
                return False
            await asyncio.wait([self._wait_free(path) for path in dead], return_when=asyncio.FIRST_COMPLETED,
                               timeout=None if math.isinf(left) else left)

    async def _find_locked(self) -> dict[Path, int | str] | None:
        """Return the locked entries and unfinished images, each with the number of its job or the id of the image."""
        try:
            return await asyncio.to_thread(self._read_locked)
        except OSError:
            return None

    def _read_locked(self) -> dict[Path, int | str]:
        journal = Journal(self._runtime)
        found: dict[Path, int | str] = {journal.path(one): one.begin.job for one in journal.entries()}
        found |= {path: image for image, path in self._spool.unfinished()}
        return {path: whose for path, whose in found.items() if flock.is_locked(path)}

    def _of_the_dead(self, locked: Mapping[Path, int | str]) -> list[Path]:
        """Return those that belong to no living worker."""
        alive = self._pool.requests
        theirs = {request.job for request in alive} | {request.image_id for request in alive}
        any_import = any(request.operation == 'import' for request in alive)        # an import chooses the id itself
        return [path for path, whose in locked.items()
                if whose not in theirs and not (any_import and isinstance(whose, str))]

    def _wait_free(self, path: Path) -> 'asyncio.Future[None]':
        """Wait for a lock in a separate thread, because the loop's own threads would delay its end."""
        if path in self._locked:
            return self._locked[path]
        log.warning('recovery: %s is locked by an unknown process; it is recovered when the lock is released', path)
        loop = asyncio.get_running_loop()
        future = self._locked[path] = loop.create_future()

        def tell() -> None:
            del self._locked[path]
            future.set_result(None)

        def wait() -> None:
            flock.wait_free(path)
            with contextlib.suppress(RuntimeError):     # the loop is closed
                loop.call_soon_threadsafe(tell)

        threading.Thread(target=wait, name='flock', daemon=True).start()
        return future

    async def _run_once(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            for sentence in await asyncio.to_thread(self._recover, loop):
                log.warning('recovery: %s', sentence)
            if await asyncio.to_thread(left_about_files, Journal(self._runtime)):
                await self._recover_files()
        except (OSError, CkptError) as error:
            log.error('cannot recover the entries of the journal in %s: %s', self._runtime, error)
        try:
            for image in await asyncio.to_thread(self._spool.remove_stale):
                log.warning('recovery: removed the unfinished image %s', image)
        except CkptError as error:
            log.error('cannot clear the spool: %s', error)

    def _recover(self, loop: asyncio.AbstractEventLoop) -> list[str]:
        units = self._units
        if units is None:
            return recover(Journal(self._runtime))

        def thaw(unit: str) -> None:
            asyncio.run_coroutine_threadsafe(units.thaw(unit), loop).result()

        def freeze(unit: str) -> None:
            asyncio.run_coroutine_threadsafe(units.freeze(unit, FREEZE_TIMEOUT), loop).result()

        return recover(Journal(self._runtime), thaw, freeze)

    async def _recover_files(self) -> None:
        """Let a worker put files back, because the daemon has a sandbox and threads."""
        request = RecoverRequest(caller=Caller(os.geteuid(), os.getegid()), spool=str(self._spool.directory),
                                 runtime=str(self._runtime))
        worker = await self._pool.take(request)
        try:
            worker.send(Start(request))
            while (message := await worker.receive()) is not None:
                if isinstance(message, Failed):
                    raise message.error()
                if isinstance(message, Finished):
                    for sentence in message.result['report']:
                        log.warning('recovery: %s', sentence)
                    if not message.more:
                        return
            raise worker.died('it ended before the recovery')
        finally:
            await self._pool.give_back(worker)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""After a worker or a daemon died: thaw what the journal names, remove what was never published, put files back."""

import asyncio
import logging
import os
from pathlib import Path

from ckptd.engine.messages import Caller, Failed, Finished, JobRequest, Start
from ckptd.errors import CkptError
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.run import Units
from ckptd.jobs.spool import Spool
from ckptd.journal import Journal, recover
from ckptd.journal.recover import left_about_files

log = logging.getLogger(__name__)

FREEZE_TIMEOUT = 10.0       # seconds, for a unit that a job had thawed and has to give back frozen


class Recovery:
    """One recovery at a time, in a thread: cgroup files and a slow disk must not stop the daemon's loop."""

    def __init__(self, runtime: Path, spool: Spool, units: Units | None, pool: WorkerPool) -> None:
        self._runtime, self._spool, self._units, self._pool = runtime, spool, units, pool
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Never fails: what cannot be put right is logged, and tried again by the next recovery."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            try:
                for sentence in await asyncio.to_thread(self._recover, loop):
                    log.warning('recovery: %s', sentence)
                if await asyncio.to_thread(left_about_files, Journal(self._runtime)):
                    await self._recover_files()
            except (OSError, CkptError) as error:
                log.error('cannot recover what the journal in %s names: %s', self._runtime, error)
            try:
                for image in await asyncio.to_thread(self._spool.remove_stale):
                    log.warning('recovery: removed image %s, which was never finished', image)
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
        """By a worker: the daemon has a sandbox, and threads."""
        request = JobRequest('recover', '', Caller(os.geteuid(), os.getegid()), str(self._spool.directory),
                             str(self._runtime))
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
            raise worker.died('it ended before it had recovered anything')
        finally:
            await self._pool.give_back(worker)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""After a worker or a daemon died: thaw what the journal names, remove what was never published."""

import asyncio
import logging
from pathlib import Path

from ckptd.errors import CkptError
from ckptd.jobs.run import Units
from ckptd.jobs.spool import Spool
from ckptd.journal import Journal, recover

log = logging.getLogger(__name__)

FREEZE_TIMEOUT = 10.0       # seconds, for a unit that a job had thawed and has to give back frozen


class Recovery:
    """One recovery at a time, in a thread: cgroup files and a slow disk must not stop the daemon's loop."""

    def __init__(self, runtime: Path, spool: Spool, units: Units | None) -> None:
        self._runtime, self._spool, self._units = runtime, spool, units
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Never fails: what cannot be put right is logged, and tried again by the next recovery."""
        loop = asyncio.get_running_loop()
        async with self._turn:
            try:
                for sentence in await asyncio.to_thread(self._recover, loop):
                    log.warning('recovery: %s', sentence)
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

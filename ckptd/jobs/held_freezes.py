# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freezes that outlive their jobs: each keeps its worker until somebody thaws, or the process ends that was named."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from ckptd.errors import CkptError, NoSuchTarget, WorkerDied
from ckptd.jobs.entry import QueuedJob, reason
from ckptd.jobs.run import Run
from ckptd.jobs.target_process import ProcessWatch
from ckptd.jobs.worker import MAX_STATUS

log = logging.getLogger(__name__)

Bury = Callable[[Run, int, bool], Awaitable[str]]


def not_held(target: str) -> NoSuchTarget:
    """The error for what nobody has left frozen, or nobody that the caller may know of."""
    return NoSuchTarget(f'{target} is not frozen by ckptd', resource=target,
                        hint='the property FrozenTargets names what is')


class HeldFreezes:
    """By target, as parse_target spells it. bury(run, proper status, failed): the end of a worker. changed(uid): who
    asked for it has one more, or one less."""

    def __init__(self, bury: Bury, changed: Callable[[int], None]) -> None:
        self._bury, self._changed = bury, changed
        self._held: dict[str, QueuedJob] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[QueuedJob]:
        return iter(list(self._held.values()))

    @property
    def owners(self) -> dict[str, int]:
        """What is held, and the uid of who asked for it."""
        return {target: entry.job.request.asked_by for target, entry in sorted(self._held.items())}

    def begin(self, entry: QueuedJob) -> None:
        """What the job has frozen stays so; `keep` has to run."""
        request = entry.job.request
        entry.let_go = asyncio.get_running_loop().create_future()
        self._held[request.target] = entry
        self._changed(request.asked_by)

    async def keep(self, entry: QueuedJob, run: Run) -> None:
        """Until it is let go of."""
        request, failure = entry.job.request, None
        life = self._watch(entry)
        try:
            await run.hold()
        except CkptError as error:
            failure = error
        if life is not None:
            life.close()
        died = await self._bury(run, 0 if failure is None else MAX_STATUS, failure is not None)
        if died:
            failure = reason(entry, WorkerDied(''), died)
        del self._held[request.target]
        self._changed(request.asked_by)
        assert entry.let_go is not None
        if failure is None:
            entry.let_go.set_result(None)
        else:
            log.error('%s: the freeze of %s was lost: %s', entry.job.name, request.target, failure)
            entry.let_go.set_exception(failure)
            entry.let_go.exception()    # where nobody waits for it, the log has it

    async def thaw(self, target: str) -> None:
        """Let go. NoSuchTarget, WorkerDied."""
        entry = self.find(target)
        assert entry.let_go is not None
        self.let_go(entry)      # it may be about to, and not listen any more
        await asyncio.shield(entry.let_go)

    def find(self, target: str) -> QueuedJob:
        """The job that has left it frozen. NoSuchTarget."""
        if target not in self._held:
            raise not_held(target)
        return self._held[target]

    def let_go(self, entry: QueuedJob) -> None:
        """Begin to."""
        try:
            if entry.run is not None:
                entry.run.thaw()
        except CkptError as error:
            log.error('%s: %s', entry.job.name, error)

    def _watch(self, entry: QueuedJob) -> ProcessWatch | None:
        """The number of a process that was killed while it stood still will be another's, whom nobody has frozen."""
        request = entry.job.request
        try:
            return ProcessWatch.of(request.target, request.start_time, partial(self._ended, entry))
        except NoSuchTarget:
            self._ended(entry)
            return None

    def _ended(self, entry: QueuedJob) -> None:
        log.info('%s: %s has ended, and with it its freeze', entry.job.name, entry.job.request.target)
        self.let_go(entry)

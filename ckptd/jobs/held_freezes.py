# SPDX-License-Identifier: LGPL-2.1-or-later
"""Freezes that outlive their jobs. Each keeps its worker until a thaw, until the process named in the request ends, or
until the unit named there is stopped."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from ckptd.errors import CkptError, NoSuchTarget, WorkerDied
from ckptd.jobs.admission import Exclusive
from ckptd.jobs.entry import QueuedJob, reason
from ckptd.jobs.run import Run, Units
from ckptd.jobs.target_process import ProcessWatch
from ckptd.jobs.worker import MAX_STATUS
from ckptd.target import Target, UnitTarget

log = logging.getLogger(__name__)

EndWorker = Callable[[Run, int, bool], Awaitable[str]]


def not_held(target: Target) -> NoSuchTarget:
    """Return the error for a target that is not left frozen, or whose freeze the caller may not see."""
    return NoSuchTarget(f'{target} is not frozen by ckptd', resource=str(target),
                        hint='the property FrozenTargets lists frozen targets')


def _request(entry: QueuedJob) -> Exclusive:
    request = entry.job.request
    assert isinstance(request, Exclusive)      # no other job can hold a freeze (Run)
    return request


class HeldFreezes:
    """Held freezes by target.

    end_worker(run, proper status, failed): called at the end of a worker. changed(uid): called when the freezes of a
    user change. units: the manager of units, None if there is none.
    """

    def __init__(self, end_worker: EndWorker, changed: Callable[[int], None], units: Units | None) -> None:
        self._end_worker, self._changed, self._units = end_worker, changed, units
        self._held: dict[Target, QueuedJob] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[QueuedJob]:
        return iter(list(self._held.values()))

    @property
    def owners(self) -> dict[Target, int]:
        """Return the held targets, each with the uid of the user who asked for the freeze."""
        return {target: entry.job.request.asked_by for target, entry in self._held.items()}

    def begin(self, entry: QueuedJob) -> None:
        """Hold the freeze that the job made. `keep` must run afterwards."""
        request = _request(entry)
        entry.let_go = asyncio.get_running_loop().create_future()
        self._held[request.target] = entry
        self._changed(request.asked_by)

    async def keep(self, entry: QueuedJob, run: Run) -> None:
        """Keep the freeze until it is released."""
        request, failure = _request(entry), None
        life = self._watch(entry)
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._follow_unit(entry))
            try:
                await run.hold()
            except CkptError as error:
                failure = error
            following.cancel()
        if life is not None:
            life.close()
        died = await self._end_worker(run, 0 if failure is None else MAX_STATUS, failure is not None)
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
            # retrieve the error, which is logged, so that asyncio does not warn if no thaw waits for it
            entry.let_go.exception()

    async def thaw(self, target: Target) -> None:
        """Release a freeze and wait for it. NoSuchTarget, WorkerDied."""
        entry = self.find(target)
        assert entry.let_go is not None
        self.let_go(entry)      # the worker may be about to do so already and then no longer listens
        await asyncio.shield(entry.let_go)

    def find(self, target: Target) -> QueuedJob:
        """Return the job that left the target frozen. NoSuchTarget."""
        if target not in self._held:
            raise not_held(target)
        return self._held[target]

    def let_go(self, entry: QueuedJob) -> None:
        """Begin to release the freeze."""
        try:
            if entry.run is not None:
                entry.run.thaw()
        except CkptError as error:
            log.error('%s: %s', entry.job.name, error)

    def _watch(self, entry: QueuedJob) -> ProcessWatch | None:
        """Watch the process. If it is killed while frozen, its pid may later belong to another process, which is not
        frozen."""
        request = _request(entry)
        try:
            return ProcessWatch.of(request.target, request.start_time, partial(self._ended, entry))
        except NoSuchTarget:
            self._ended(entry)
            return None

    async def _follow_unit(self, entry: QueuedJob) -> None:
        """Release the freeze of a unit when the unit is stopped. Its processes are then told to end, which they cannot
        while they are frozen."""
        target = _request(entry).target
        if self._units is None or not isinstance(target, UnitTarget):
            return
        try:
            await self._units.await_end(target.name)
        except CkptError as error:
            log.warning('%s: the freeze of %s outlasts its stop: %s', entry.job.name, target, error)
        else:
            log.info('%s: %s is being stopped, so its freeze ends', entry.job.name, target)
            self.let_go(entry)

    def _ended(self, entry: QueuedJob) -> None:
        log.info('%s: %s has ended, so its freeze has ended', entry.job.name, entry.job.request.about)
        self.let_go(entry)

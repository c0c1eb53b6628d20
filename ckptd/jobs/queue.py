# SPDX-License-Identifier: LGPL-2.1-or-later
"""The queue: it decides which job runs when, and it is the only owner of asyncio tasks.

A job waits for a slot, works in a process of its own, is settled (done, failed or cancelled), and stays known for a
while, so that a late question about it is answered. A job that leaves a freeze behind keeps its worker, without a slot,
until a thaw. A job that waits for the end of a restored tree runs on without a slot, too.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from ckptd.config import Config
from ckptd.errors import Cancelled, CkptError, LimitsExceeded, PermissionDenied, Unavailable, WorkerDied
from ckptd.jobs.admission import Exclusive, Sees, refuse_active, refuse_conflict, refuse_token, refuse_too_many
from ckptd.jobs.audit import audit
from ckptd.jobs.by_number import KnownJobs
from ckptd.jobs.entry import Listener, QueuedJob, reason
from ckptd.jobs.held_freezes import HeldFreezes
from ckptd.jobs.inhibitors import InhibitorLock, Inhibitors
from ckptd.jobs.overlap import Relations
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.quota import Quota
from ckptd.jobs.recovery import FREEZING, Recovery
from ckptd.jobs.run import Run, Units, with_facts
from ckptd.jobs.slots import SlotGroups
from ckptd.jobs.state import JobRecord
from ckptd.jobs.tasks import Tasks
from ckptd.jobs.throttle import Throttle
from ckptd.jobs.worker import MAX_STATUS, WorkerHandle
from ckptd.protocol.messages import FromWorker, ProgressReport, TreeRuns
from ckptd.protocol.requests import CheckpointRequest, Request, RestoreRequest
from ckptd.target import Target

log = logging.getLogger(__name__)

# operations that are announced as jobs; the others are short, and only their caller needs to know
ANNOUNCED = frozenset({'checkpoint', 'freeze', 'verify', 'export', 'import', 'restore'})
PROGRESS_INTERVAL = 0.1     # seconds
CANCEL_PATIENCE = 8.0      # seconds after which a worker that does not end is killed; recovery then thaws its tree


class Queue:
    """A queue, to be made inside a running loop."""

    def __init__(self, config: Config, pool: WorkerPool, recovery: Recovery, units: Units | None,
                 listener: Listener, quota: Quota) -> None:
        self._config, self._pool, self._recovery, self._quota = config, pool, recovery, quota
        self._units, self._listener = units, listener
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks()
        self.spawn = recovery.spawn = self._tasks.spawn
        self._numbers = itertools.count(1)
        self._slot_groups = SlotGroups(config)
        self.inhibitors = Inhibitors()
        self._entries: dict[JobRecord, QueuedJob] = {}    # jobs that are not over
        self._known = KnownJobs(config.keep_jobs_usec / 1e6, listener.job_forgotten)      # announced jobs, over or not
        self._held = HeldFreezes(self._end_worker, listener.frozen_changed, units)
        self._stuck: set[asyncio.Task[None]] = set()
        self._stopping = False

    # ------------------------------------------------------------ questions

    @property
    def jobs(self) -> list[JobRecord]:
        """List announced jobs by number, including those settled a moment ago."""
        return list(self._known)

    @property
    def frozen(self) -> dict[Target, int]:
        """Return the targets held frozen, each with the uid of the user who asked for it."""
        return self._held.owners

    @property
    def idle(self) -> bool:
        """Whether no job waits, works or may still be asked about, and nothing is held."""
        return not (self._entries or self._held or self._known or self.inhibitors or self._recovery.waiting)

    def works_on(self, image: str) -> bool:
        """Whether some job reads or writes this image. A restored tree that runs no longer needs it."""
        return any(job.request.image_id == image and not job.root for job in self._entries)

    # ------------------------------------------------------------ requests

    def submit(self, request: Request, fds: Sequence[int] = (), token: str = '') -> JobRecord:
        """Accept a request. The fds are duplicated. Busy, LimitsExceeded, InvalidArgument, Unavailable."""
        return self._enter(request, fds, token).job

    async def call(self, request: Request, fds: Sequence[int] = ()) -> dict[str, Any]:
        """Accept a request and wait for its result or error. If the caller leaves, the job is cancelled."""
        entry = self._enter(request, fds, '')
        try:
            await entry.over.wait()
        finally:
            self._cancel(entry)
        if entry.job.error is not None:
            raise entry.job.error
        return entry.job.result

    def when_over(self, job: JobRecord, callback: Callable[[], None]) -> None:
        """Call back once the job is over, or at once if it is already."""
        entry = self._entries.get(job)
        if entry is None:
            callback()
        else:
            entry.when_over.append(callback)

    def cancel(self, number: int) -> None:
        """Ask a job to release its tree and leave nothing behind. A finished job is not changed. NoSuchJob."""
        if entry := self._entries.get(self._known[number]):
            self._cancel(entry)

    async def thaw(self, target: Target, sees: Sees = lambda owner: True) -> None:
        """Thaw a held target. sees: tells whose jobs an error may name. NoSuchTarget, Busy, WorkerDied."""
        self._held.find(target)
        refuse_active(target, self._entries, self._relations().overlap, sees)
        await self._held.thaw(target)

    def inhibit(self, holder: InhibitorLock, start_time: int) -> int:
        """Delay checkpoints, like Inhibitors.take. Unavailable."""
        self._refuse_late()
        return self.inhibitors.take(holder, start_time)

    def _enter(self, request: Request, fds: Sequence[int], token: str) -> QueuedJob:
        self._refuse_late()
        users = [job.request.asked_by for job in (*self._entries, *(entry.job for entry in self._held))]
        refuse_too_many(request, (*users, *self._pool.stuck), self._config.max_jobs_per_user,
                        self._config.max_queued_jobs)
        relations = self._relations()
        refuse_conflict(request, self._entries, self._held.owners, relations.overlap)
        refuse_token(token, self._known)
        with contextlib.ExitStack() as undo:
            entry = self._make(request, fds, token)
            undo.callback(entry.close)
            if isinstance(request, Exclusive):
                entry.lineage = relations.lineage(request.target)
            self._entries[entry.job] = entry
            undo.callback(self._entries.pop, entry.job)
            self._quota.begin(entry.job)
            undo.callback(self._quota.end, entry.job)
            if entry.job.number:
                self._known.add(entry.job)
                undo.callback(self._known.drop, entry.job)
                self._listener.job_new(entry.job)
            entry.task = self.spawn(self._live(entry), name=entry.job.name)
            undo.pop_all()
        return entry

    def _refuse_late(self) -> None:
        if self._stopping:
            raise Unavailable('ckptd is stopping', hint='try again')

    def _relations(self) -> Relations:
        """Return relations between the targets of all jobs and freezes, with their lineages when accepted."""
        return Relations({request.target: entry.lineage for entry in (*self._held, *self._entries.values())
                          if entry.lineage and isinstance(request := entry.job.request, Exclusive)})

    def _make(self, request: Request, fds: Sequence[int], token: str) -> QueuedJob:
        number = next(self._numbers) if request.operation in ANNOUNCED else 0
        job = JobRecord(number, msgspec.structs.replace(request, job=number), time.time_ns() // 1000, token)
        throttle = Throttle(PROGRESS_INTERVAL, partial(self._listener.job_progress, job))
        return QueuedJob(job, [os.dup(fd) for fd in fds], self._slot_groups.of(request, number > 0), throttle)

    # ------------------------------------------------------------ the life of a job

    async def _live(self, entry: QueuedJob) -> None:
        try:
            await entry.enter_slot()
            await self._prepare(entry)
            entry.begun = True
            await self._begin(entry)
        except WorkerDied as error:
            self._settle(entry, error)
        finally:
            entry.leave_slot()
            # Only an error in ckptd raises above, or the cancellation of a job that waited and is over. The caller
            # still gets an answer, and the tree is released.
            if not entry.job.over:
                entry.kill()
                self._settle(entry, CkptError(f'internal error in {entry.job.name}', hint='see the log of the daemon'))

    async def _prepare(self, entry: QueuedJob) -> None:
        """Announce that a tree is about to be frozen and give inhibitors a moment. Other jobs may run meanwhile."""
        job = entry.job
        if not isinstance(job.request, CheckpointRequest):
            return
        inhibitors = self.inhibitors.of(job.request.target)
        entry.prepared = inhibitors
        self._listener.job_prepares(job, True, inhibitors)
        if inhibitors:
            job.enter('prepare', self._loop.time())
            self._listener.job_changed(job)
            entry.leave_slot()
            await self.inhibitors.wait(inhibitors, self._config.inhibit_delay_usec / 1e6)
            await entry.enter_slot()

    async def _begin(self, entry: QueuedJob) -> None:
        entry.job.request = await with_facts(entry.job.request, self._units)
        worker = await self._pool.take(entry.job.request)
        if entry.job.over:      # it was cancelled while systemd started the worker
            await self._pool.give_back(worker)
            return
        entry.run = Run(entry.job, worker, self._units, partial(self._changed, entry), self._pool.pids, self._pool)
        await self._work(entry, entry.run)

    async def _work(self, entry: QueuedJob, run: Run) -> None:
        try:
            run.start(entry.fds)
            entry.listen()
            entry.close_fds()
            result = await run.work()
        except CkptError as error:
            died = await self._end_worker(run, -1 if isinstance(error, WorkerDied) else MAX_STATUS, True)
            self._settle(entry, entry.excess or reason(entry, error, died))
            return
        if run.job.request.operation in ('checkpoint', 'import'):
            self._quota.end(run.job)        # from here on its image counts
            await self._listener.images_changed()
        if run.frozen is not None:
            self._held.begin(entry)
            self.spawn(self._held.keep(entry, run), name=f'freeze of {run.job.request.about}')
            if self._stopping:
                self._held.let_go(entry)
        self._settle(entry, result)
        if run.frozen is None:
            await self._end_worker(run, MAX_STATUS)

    async def _end_worker(self, run: Run, proper: int, failed: bool = False) -> str:
        """End the worker and repair what a dead one left. Return, for example, 'was killed by SIGKILL', or '' after a
        proper end.

        proper: the highest exit status of a proper end; -1 if the worker is known to have died. failed: the worker
        reported an error. It may have failed to release the tree, so the journal's entries are undone here.
        """
        status = await self._pool.give_back(run.worker)
        if run.worker.stuck:
            self._await_stuck(run.worker)
        died = '' if 0 <= status <= proper else run.worker.describe(status)
        if died:
            log.error('%s: worker %d %s', run.job.name, run.worker.pid, died)
        if died or (failed and run.job.request.operation in FREEZING):
            await self._recovery.run()
        if died:
            await self._listener.images_changed()
        return died

    def _await_stuck(self, worker: WorkerHandle) -> None:
        task = self.spawn(self._pool.await_stuck(worker), name=f'end of worker {worker.pid}')
        self._stuck.add(task)
        task.add_done_callback(self._stuck.discard)

    def _settle(self, entry: QueuedJob, outcome: CkptError | dict[str, Any]) -> None:
        job = entry.job
        if job.over:
            return
        if isinstance(outcome, CkptError):
            job.fail(outcome)
            if isinstance(outcome, PermissionDenied):       # the kernel refused, or the rights that the image asks for
                audit('refused', outcome.resource, operation=job.request.operation, uid=job.request.asked_by,
                      pid=job.request.caller.pid, what=job.request.image_id or job.request.about, task=outcome.task)
        else:
            job.finish(outcome)
        del self._entries[job]
        self._quota.end(job)
        entry.close()
        if job.number:
            entry.throttle.poke()
            entry.throttle.flush()
            self._listener.job_changed(job)
            self._listener.job_removed(job)
            self._known.over(job)
        if entry.prepared is not None:      # above all the inhibitors that were released meanwhile
            self._listener.job_prepares(job, False, entry.prepared)
        entry.over.set()
        for callback in entry.when_over:
            try:
                callback()
            except Exception:
                # An error in ckptd. The remaining callbacks still run.
                log.exception('a callback failed after %s ended', job.name)

    def _changed(self, entry: QueuedJob, message: FromWorker | None) -> None:
        entry.heard = self._loop.time()
        if isinstance(message, TreeRuns):
            self._listener.tree_restored(entry.job, message.tasks)
            if isinstance(entry.job.request, RestoreRequest) and entry.job.request.wait:
                entry.leave_slot()
        if entry.job.number and not entry.job.over:
            if isinstance(message, ProgressReport):
                entry.throttle.poke()
                self._limit(entry)
            else:
                self._listener.job_changed(entry.job)

    def _limit(self, entry: QueuedJob) -> None:
        """End a job that would write more than there is room for."""
        if entry.excess is None:
            try:
                self._quota.check(entry.job)
            except LimitsExceeded as error:
                entry.excess = error
                self._cancel(entry)

    def _cancel(self, entry: QueuedJob) -> None:
        if entry.job.over or entry.deadline is not None:
            return
        if entry.run is None:
            self._settle(entry, Cancelled(f'{entry.job.name} was cancelled before it began'))
            if not entry.begun and entry.task is not None:
                entry.task.cancel()     # it waits for its turn or for inhibitors
            return
        entry.run.cancel()
        entry.deadline = self._loop.call_later(CANCEL_PATIENCE, entry.kill)

    # ------------------------------------------------------------ beginning and end

    async def start(self) -> None:
        """Start the pool and repair what an earlier daemon left."""
        self._pool.start()
        await self._recovery.run(0.0)

    def close(self) -> None:
        """Accept nothing any more: a request for a job, a freeze or an inhibitor fails with Unavailable."""
        self._stopping = True

    async def stop(self) -> None:
        """Cancel every job, thaw every tree, end every worker. Nothing of this daemon is left afterwards."""
        self.close()
        for entry in list(self._entries.values()):
            self._cancel(entry)
        for entry in self._held:
            self._held.let_go(entry)
        for task in (*self._stuck, *self._recovery.waiting):
            task.cancel()       # they end when they can
        await self._tasks.drain(CANCEL_PATIENCE + 2.0, self._kill_all)
        self._known.close()
        self.inhibitors.close()
        self._pool.close()

    def _kill_all(self) -> None:
        for entry in (*self._entries.values(), *self._held):
            entry.kill()

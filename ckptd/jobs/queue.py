# SPDX-License-Identifier: LGPL-2.1-or-later
"""The queue: who may work when, and the only owner of asyncio tasks.

A job waits for a place in its lane, works in a process of its own, is settled (done, failed or cancelled) and stays
known for a while, so that a late question about it is still answered. A job that leaves a freeze behind keeps its
worker, out of the lane, until somebody thaws; one that attends the end of a restored tree runs on out of it, for as
long as that takes. There are three lanes: a long dump does not hold up a quick scan, nor a slow reader a dump.
"""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from ckptd.config import Config
from ckptd.engine.messages import FromWorker, JobRequest, Progress, Running
from ckptd.errors import Cancelled, CkptError, NoSuchJob, NoSuchTarget, PermissionDenied, Unavailable, WorkerDied
from ckptd.jobs.admission import refuse_active, refuse_conflict, refuse_token, refuse_too_many
from ckptd.jobs.audit import audit
from ckptd.jobs.entry import Entry, Listener
from ckptd.jobs.inhibitors import Inhibitors
from ckptd.jobs.lane import LANES, Lane, lane_of
from ckptd.jobs.overlap import overlap
from ckptd.jobs.pacer import Pacer
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.recovery import Recovery
from ckptd.jobs.run import Run, Units
from ckptd.jobs.state import Job
from ckptd.jobs.tasks import Tasks

log = logging.getLogger(__name__)

# operations that everybody sees as jobs; the others are short, and only their caller cares
ANNOUNCED = frozenset({'checkpoint', 'freeze', 'verify', 'export', 'import', 'restore'})
FREEZING = frozenset({'checkpoint', 'freeze', 'restore'})      # what the journal may still name when it fails
PROGRESS_INTERVAL = 0.1     # seconds
MAX_STATUS = 255            # a worker that said what failed exits with the status of the error
CANCEL_PATIENCE = 8.0      # a worker that does not let go for so long is killed; recovery then lets go for it


class Queue:
    """Made inside a running loop."""

    def __init__(self, config: Config, pool: WorkerPool, recovery: Recovery, units: Units | None,
                 listener: Listener) -> None:
        self._config, self._pool, self._recovery = config, pool, recovery
        self._units, self._listener = units, listener
        self._loop = asyncio.get_running_loop()
        self._tasks = Tasks()
        self.spawn = self._tasks.spawn
        self._numbers = itertools.count(1)
        self._lanes = {name: Lane(config.max_jobs) for name in LANES}
        self.inhibitors = Inhibitors()
        self._entries: dict[Job, Entry] = {}    # not over
        self._known: dict[int, Job] = {}        # announced, over or not
        self._held: dict[str, Entry] = {}       # by target
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._stopping = False

    # ------------------------------------------------------------ questions

    @property
    def jobs(self) -> list[Job]:
        """Announced jobs by number, those that were settled a moment ago included."""
        return list(self._known.values())

    @property
    def frozen(self) -> dict[str, int]:
        """What is held frozen, and the uid of who asked for it."""
        return {target: entry.job.request.asked_by for target, entry in sorted(self._held.items())}

    @property
    def idle(self) -> bool:
        """Nothing waits, works, is held, or might still be asked about."""
        return not (self._entries or self._held or self._known or self.inhibitors)

    def works_on(self, image: str) -> bool:
        """Some job reads or writes this image; a tree that was restored and runs needs it no more."""
        return any(job.request.image == image and not job.root for job in self._entries)

    # ------------------------------------------------------------ requests

    def submit(self, request: JobRequest, fds: Sequence[int] = (), token: str = '') -> Job:
        """Take a request in. The fds are duplicated. Busy, LimitsExceeded, InvalidArgument, Unavailable."""
        return self._enter(request, fds, token).job

    async def call(self, request: JobRequest, fds: Sequence[int] = ()) -> dict[str, Any]:
        """Take a request in and wait for its result or error. A caller that goes away cancels it."""
        entry = self._enter(request, fds, '')
        try:
            await entry.over.wait()
        finally:
            self._cancel(entry)
        if entry.job.error is not None:
            raise entry.job.error
        return entry.job.result

    def when_over(self, job: Job, callback: Callable[[], None]) -> None:
        """Call back once the job is over; at once if it is."""
        entry = self._entries.get(job)
        if entry is None:
            callback()
        else:
            entry.when_over.append(callback)

    def cancel(self, number: int) -> None:
        """Ask a job to let go and leave nothing. One that is over stays as it is. NoSuchJob."""
        if number not in self._known:
            raise NoSuchJob(f'there is no job {number}')
        entry = self._entries.get(self._known[number])
        if entry is not None:
            self._cancel(entry)

    async def thaw(self, target: str) -> None:
        """Let go of what `Freeze` or after=freeze left frozen. NoSuchTarget, Busy, WorkerDied."""
        entry = self._held.get(target)
        if entry is None or entry.run is None or entry.let_go is None:
            raise NoSuchTarget(f'{target} is not frozen by ckptd', resource=target,
                               hint='the property FrozenTargets names what is')
        refuse_active(target, self._entries, overlap)
        self._let_go(entry)     # it may be about to, and not listen any more
        await asyncio.shield(entry.let_go)

    def _enter(self, request: JobRequest, fds: Sequence[int], token: str) -> Entry:
        if self._stopping:
            raise Unavailable('ckptd is stopping')
        held = [entry.job for entry in self._held.values()]
        refuse_too_many(request, [*self._entries, *held], self._config.max_jobs_per_user, self._config.max_queued_jobs)
        refuse_conflict(request, self._entries, self._held, overlap)
        refuse_token(token, self._known.values())
        entry = self._make(request, fds, token)
        self._entries[entry.job] = entry
        if entry.job.number:
            self._known[entry.job.number] = entry.job
            self._listener.job_new(entry.job)
        self.spawn(self._live(entry), name=entry.job.name)
        return entry

    def _make(self, request: JobRequest, fds: Sequence[int], token: str) -> Entry:
        announced = request.operation in ANNOUNCED
        number = next(self._numbers) if announced else 0
        request = msgspec.structs.replace(request, job=number)
        job = Job(number, request, time.time_ns() // 1000, token)
        pacer = Pacer(PROGRESS_INTERVAL, partial(self._listener.job_progress, job))
        return Entry(job, [os.dup(fd) for fd in fds], self._lanes[lane_of(request, announced)], pacer)

    # ------------------------------------------------------------ the life of a job

    async def _live(self, entry: Entry) -> None:
        await entry.enter_lane()
        try:
            await self._prepare(entry)
            if not entry.job.over:      # cancelled while it waited
                await self._begin(entry)
        except WorkerDied as error:
            self._settle(entry, error)
        finally:
            entry.leave_lane()
            # nothing above raises but by a mistake of ours: the caller still gets an answer, the tree its freedom
            if not entry.job.over:
                entry.kill()
                self._settle(entry, CkptError(f'{entry.job.name} failed inside ckptd', hint='see its log'))

    async def _prepare(self, entry: Entry) -> None:
        """Tell who wants to know that a tree is about to be frozen, and give them a moment, while others may work."""
        job = entry.job
        if job.request.operation != 'checkpoint' or job.over:
            return
        inhibitors = self.inhibitors.of(job.request.target)
        entry.prepared = inhibitors
        self._listener.job_prepares(job, True, inhibitors)
        if inhibitors:
            job.enter('prepare', self._loop.time())
            self._listener.job_changed(job)
            entry.leave_lane()
            await self.inhibitors.wait(inhibitors, self._config.inhibit_delay_usec / 1e6)
            await entry.enter_lane()

    async def _begin(self, entry: Entry) -> None:
        worker = await self._pool.take(entry.job.request)
        self._loop.call_soon(self._pool.warm)
        if entry.job.over:      # cancelled while systemd started it
            await self._pool.give_back(worker)
            return
        entry.run = Run(entry.job, worker, self._units, partial(self._changed, entry), self._pool.pids)
        await self._work(entry, entry.run)

    async def _work(self, entry: Entry, run: Run) -> None:
        try:
            run.start(entry.fds)
            entry.close_fds()
            result = await run.work()
        except CkptError as error:
            died = await self._bury(run, -1 if isinstance(error, WorkerDied) else MAX_STATUS, failed=True)
            self._settle(entry, _reason(entry, error, died))
            return
        if run.job.request.operation in ('checkpoint', 'import'):
            await self._listener.images_changed()
        if run.frozen is not None:
            self._hold(entry, run)
        self._settle(entry, result)
        if run.frozen is None:
            await self._bury(run, MAX_STATUS)

    def _hold(self, entry: Entry, run: Run) -> None:
        target = run.job.request.target
        entry.let_go = self._loop.create_future()
        self._held[target] = entry
        self._listener.frozen_changed()
        self.spawn(self._keep(entry, run, entry.let_go), name=f'freeze of {target}')
        if self._stopping:
            self._let_go(entry)

    async def _keep(self, entry: Entry, run: Run, let_go: asyncio.Future[None]) -> None:
        failure: CkptError | None = None
        try:
            await run.hold()
        except CkptError as error:
            failure = error
        died = await self._bury(run, 0 if failure is None else MAX_STATUS, failed=failure is not None)
        if died:
            failure = _reason(entry, WorkerDied(''), died)
        del self._held[run.job.request.target]
        self._listener.frozen_changed()
        if failure is None:
            let_go.set_result(None)
        else:
            log.error('%s: the freeze of %s was lost: %s', run.job.name, run.job.request.target, failure)
            let_go.set_exception(failure)
            let_go.exception()      # where nobody waits for it, the log has it

    async def _bury(self, run: Run, proper: int, *, failed: bool = False) -> str:
        """End the worker and put right what a dead one left: 'was killed by SIGKILL'; '' after a proper end.

        proper: the highest exit status that is one; -1 for none, since it is known to have died. failed: it said what
        went wrong, and that may have been the letting go: what the journal still names is then undone here.
        """
        status = await self._pool.give_back(run.worker)
        died = '' if 0 <= status <= proper else run.worker.describe(status)
        if died:
            log.error('%s: worker %d %s', run.job.name, run.worker.pid, died)
        if died or (failed and run.job.request.operation in FREEZING):
            await self._recovery.run()
        if died:
            await self._listener.images_changed()
        return died

    def _settle(self, entry: Entry, outcome: CkptError | dict[str, Any]) -> None:
        job = entry.job
        if job.over:
            return
        if isinstance(outcome, CkptError):
            job.fail(outcome)
            if isinstance(outcome, PermissionDenied):       # by the kernel, or for what the image would give
                audit('refused', outcome.resource, operation=job.request.operation, uid=job.request.asked_by,
                      pid=job.request.caller.pid, what=job.request.image or job.request.target, task=outcome.task)
        else:
            job.finish(outcome)
        del self._entries[job]
        entry.close()
        if job.number:
            entry.pacer.poke()
            entry.pacer.flush()
            self._listener.job_changed(job)
            self._listener.job_removed(job)
            self._timers[job.number] = self._loop.call_later(self._config.keep_jobs_usec / 1e6, self._forget, job)
        if entry.prepared is not None:      # those who have let go meanwhile most of all
            self._listener.job_prepares(job, False, entry.prepared)
        entry.over.set()
        for callback in entry.when_over:
            callback()

    def _forget(self, job: Job) -> None:
        del self._known[job.number], self._timers[job.number]
        self._listener.job_forgotten(job)

    def _changed(self, entry: Entry, message: FromWorker | None) -> None:
        if isinstance(message, Running):
            self._listener.tree_restored(entry.job, message.tasks)
            if entry.job.request.wait:
                entry.leave_lane()
        if entry.job.number and not entry.job.over:
            if isinstance(message, Progress):
                entry.pacer.poke()
            else:
                self._listener.job_changed(entry.job)

    def _cancel(self, entry: Entry) -> None:
        if entry.job.over or entry.deadline is not None:
            return
        if entry.run is None:
            self._settle(entry, Cancelled(f'{entry.job.name} was cancelled before it began'))
            return
        entry.run.cancel()
        entry.deadline = self._loop.call_later(CANCEL_PATIENCE, entry.kill)

    # ------------------------------------------------------------ beginning and end

    async def start(self) -> None:
        """Put right what an earlier daemon left, and have a worker ready."""
        await self._recovery.run()
        self._pool.warm()

    async def stop(self) -> None:
        """Cancel every job, thaw every tree, end every worker. Afterwards nothing of this daemon is left."""
        self._stopping = True
        for entry in list(self._entries.values()):
            self._cancel(entry)
        for entry in self._held.values():
            self._let_go(entry)
        await self._tasks.drain(CANCEL_PATIENCE + 2.0, self._kill_all)
        for timer in self._timers.values():
            timer.cancel()
        self.inhibitors.close()
        await self._pool.close()

    def _let_go(self, entry: Entry) -> None:
        try:
            if entry.run is not None:
                entry.run.thaw()
        except CkptError as error:
            log.error('%s: %s', entry.job.name, error)

    def _kill_all(self) -> None:
        for entry in (*self._entries.values(), *self._held.values()):
            entry.kill()


def _reason(entry: Entry, error: CkptError, died: str) -> CkptError:
    """The error of a job. How its worker died says more than that it did; who cancelled it need not hear of either."""
    if not isinstance(error, WorkerDied):
        return error
    job = entry.job
    if entry.deadline is not None:
        return Cancelled(f'{job.name} was cancelled; its worker did not let go and was ended by force')
    message = f'the worker of {job.name} {died}' if died else error.message
    if job.root:
        return WorkerDied(f'{message}; the tree may run on, as process {job.root}', phase=job.phase,
                          task=job.root, hint=f'how it ends is not known any more; "ckptctl tree {job.root}" shows it')
    hint = 'nothing of the tree was left; see the daemon\'s log' if job.request.operation == 'restore' else None
    return WorkerDied(message, phase=job.phase, hint=hint)

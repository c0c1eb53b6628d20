# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job in the queue, with all that belongs to it until it is settled, and who hears of it."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ckptd.errors import Cancelled, CkptError, LimitsExceeded, WorkerDied
from ckptd.jobs.inhibitors import InhibitorLock
from ckptd.jobs.overlap import Lineage
from ckptd.jobs.run import Run
from ckptd.jobs.slots import Slots
from ckptd.jobs.state import JobRecord
from ckptd.jobs.throttle import Throttle
from ckptd.jobs.worker import LAST_PATIENCE
from ckptd.kernel.closing import close_foreign

log = logging.getLogger(__name__)

SILENCE = 10.0      # seconds: a worker that is at work says more


class Listener(Protocol):
    """Hears of announced jobs. job_removed: it is over; job_forgotten: nobody can ask about it any more. job_prepares:
    it is about to freeze its tree, which the inhibitors delay; not start: that is over."""
    def job_new(self, job: JobRecord) -> None: ...
    def job_changed(self, job: JobRecord) -> None: ...
    def job_progress(self, job: JobRecord) -> None: ...
    def job_removed(self, job: JobRecord) -> None: ...
    def job_forgotten(self, job: JobRecord) -> None: ...
    def job_prepares(self, job: JobRecord, start: bool, inhibitors: Sequence[InhibitorLock]) -> None: ...
    def tree_restored(self, job: JobRecord, tasks: int) -> None: ...
    def frozen_changed(self, uid: int) -> None: ...
    async def images_changed(self) -> None: ...


@dataclass(slots=True, eq=False)
class QueuedJob:
    """A job in the queue. fds: duplicates that go to its worker. over: set when it is settled. let_go: done when the
    freeze that it held is gone, with the error if that went wrong. deadline: it was cancelled, and is killed then.
    in_lane: it has a place in its lane, until it is over or only attends a tree that it has restored. prepared: those
    who delay it were told of it, and are told of its end. task: its life; begun: it waits for nothing any more. excess:
    why it was cancelled, where it wrote too much. heard: when its worker said the last thing; listening: for the next.
    when_over: called then. lineage: of its target, if it has the tree for itself, when it was taken in."""
    job: JobRecord
    fds: list[int]
    slots: Slots
    throttle: Throttle
    over: asyncio.Event = field(default_factory=asyncio.Event)
    run: Run | None = None
    let_go: asyncio.Future[None] | None = None
    deadline: asyncio.TimerHandle | None = None
    in_slot: bool = False
    prepared: 'list[InhibitorLock] | None' = None
    task: asyncio.Task[None] | None = None
    begun: bool = False
    excess: LimitsExceeded | None = None
    heard: float = 0.0
    listening: asyncio.TimerHandle | None = None
    when_over: list[Callable[[], None]] = field(default_factory=list)
    lineage: Lineage = ()

    async def enter_slot(self) -> None:
        await self.slots.acquire(self.job.request.asked_by)
        self.in_slot = True

    def leave_slot(self) -> None:
        """Again: nothing."""
        if self.in_slot:
            self.in_slot = False
            self.slots.release(self.job.request.asked_by)

    def listen(self) -> None:
        """Give the place up once the worker has said nothing for long: it waits for something that is not ours."""
        loop = asyncio.get_running_loop()
        silent = loop.time() - self.heard
        if silent >= SILENCE:
            log.info('%s has said nothing for %.0f s: others have its place', self.job.name, silent)
            self.leave_slot()
        elif self.in_slot:
            self.listening = loop.call_later(SILENCE - silent, self.listen)

    def kill(self) -> None:
        if self.run is not None:
            log.error('%s does not let go: killing worker %d', self.job.name, self.run.worker.pid)
            self.run.worker.kill()
            # a system call that waits for somebody's file system does not end by that, and the job has to
            self.deadline = asyncio.get_running_loop().call_later(LAST_PATIENCE, self.run.worker.give_up)

    def close_fds(self) -> None:
        """Once the worker has them. A terminal that is held here would be in use for as long as the job."""
        while self.fds:
            close_foreign(self.fds.pop())

    def close(self) -> None:
        self.close_fds()
        for timer in (self.deadline, self.listening):
            if timer is not None:
                timer.cancel()


def reason(entry: QueuedJob, error: CkptError, died: str) -> CkptError:
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job in the queue, with everything that belongs to it until it is settled, and the listener of its events."""

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

SILENCE = 10.0      # seconds; a working worker reports more often


class Listener(Protocol):
    """A listener to the events of announced jobs.

    job_removed: the job is over. job_forgotten: the job is no longer known. job_prepares: the job is about to freeze
    its tree and inhibitors delay it (start), or the delay and the job are over (not start).
    """
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
    """A job in the queue."""
    job: JobRecord
    fds: list[int]    # duplicates that go to its worker
    slots: Slots
    throttle: Throttle
    over: asyncio.Event = field(default_factory=asyncio.Event)  # set when the job is settled
    run: Run | None = None
    let_go: asyncio.Future[None] | None = None          # done when the freeze that it held is gone, with the error if
                                                        # thawing failed
    deadline: asyncio.TimerHandle | None = None         # the job was cancelled, and its worker is killed then
    in_slot: bool = False                               # the job holds a slot, until it is over or only waits for the
                                                        # end of a restored tree
    prepared: 'list[InhibitorLock] | None' = None       # inhibitors that delay it; they were told, and will be told of
                                                        # its end
    task: asyncio.Task[None] | None = None              # the task that runs it
    begun: bool = False                                 # it has its slot and waits for nothing any more
    excess: LimitsExceeded | None = None                # why it was cancelled, if it wrote too much
    heard: float = 0.0                                  # time of the worker's last message
    listening: asyncio.TimerHandle | None = None        # timer that waits for the next message
    when_over: list[Callable[[], None]] = field(default_factory=list)  # called when the job is over
    lineage: Lineage = ()                               # of its target when the request came in, if the job needs the
                                                        # tree for itself

    async def enter_slot(self) -> None:
        await self.slots.acquire(self.job.request.asked_by)
        self.in_slot = True

    def leave_slot(self) -> None:
        """Release the slot. A second call does nothing."""
        if self.in_slot:
            self.in_slot = False
            self.slots.release(self.job.request.asked_by)

    def listen(self) -> None:
        """Release the slot once the worker has been silent for long: it then waits for something outside of ckptd."""
        loop = asyncio.get_running_loop()
        silent = loop.time() - self.heard
        if silent >= SILENCE:
            log.info('%s has been silent for %.0f s: its slot is released', self.job.name, silent)
            self.leave_slot()
        elif self.in_slot:
            self.listening = loop.call_later(SILENCE - silent, self.listen)

    def kill(self) -> None:
        if self.run is not None:
            log.error('%s does not end: killing worker %d', self.job.name, self.run.worker.pid)
            self.run.worker.kill()
            # SIGKILL does not end a system call that waits for a user's file system, but the job must end
            self.deadline = asyncio.get_running_loop().call_later(LAST_PATIENCE, self.run.worker.give_up)

    def close_fds(self) -> None:
        """Close the duplicates once the worker has them. Otherwise a terminal would stay in use for as long as the
        job."""
        while self.fds:
            close_foreign(self.fds.pop())

    def close(self) -> None:
        self.close_fds()
        for timer in (self.deadline, self.listening):
            if timer is not None:
                timer.cancel()


def reason(entry: QueuedJob, error: CkptError, died: str) -> CkptError:
    """Return the error of a job. The way its worker died is more useful than the fact that it died. For a cancelled job
    neither matters."""
    if not isinstance(error, WorkerDied):
        return error
    job = entry.job
    if entry.deadline is not None:
        return Cancelled(f'{job.name} was cancelled; its worker did not end and was killed')
    message = f'the worker of {job.name} {died}' if died else error.message
    if job.root:
        return WorkerDied(f'{message}; the tree may run on, as process {job.root}', phase=job.phase,
                          task=job.root, hint=f'its end will not be reported; "ckptctl tree {job.root}" shows it')
    hint = 'nothing of the tree is left; see the daemon\'s log' if job.request.operation == 'restore' else None
    return WorkerDied(message, phase=job.phase, hint=hint)

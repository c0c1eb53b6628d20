# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets which worker: a warm spare, a new child, or for a restore a service of its own."""

import logging
from collections.abc import Sequence

from ckptd.engine.messages import JobRequest
from ckptd.errors import WorkerDied
from ckptd.jobs.service import Services, ServiceWorker
from ckptd.jobs.worker import COMMAND, ChildWorker, Worker

log = logging.getLogger(__name__)

# what a sandboxed daemon's child could not do: make the tree, find out whether it could be made, put files back
UNSANDBOXED = frozenset({'restore', 'check-restore', 'recover'})


class WorkerPool:
    """Starts workers and keeps one ready. services: a systemd that starts those which may not be our children."""

    def __init__(self, command: Sequence[str] = COMMAND, services: Services | None = None) -> None:
        self._command, self._services = command, services
        self._spare: ChildWorker | None = None
        self._taken: dict[Worker, int] = {}     # and the uid of who asked for their job
        self._stuck: dict[Worker, int] = {}

    @property
    def pids(self) -> tuple[int, ...]:
        """Every worker that there is: none may be in a tree that one of them freezes."""
        spare = (self._spare.pid,) if self._spare else ()
        return spare + tuple(worker.pid for worker in (*self._taken, *self._stuck))

    @property
    def stuck(self) -> tuple[int, ...]:
        """For each worker that was killed and does not end, the uid of who asked for its job."""
        return tuple(self._stuck.values())

    def warm(self) -> None:
        """Start the spare, unless there is one. One that cannot be started is tried again when it is needed."""
        if self._spare is None:
            try:
                self._spare = ChildWorker(self._command)
            except WorkerDied as error:
                log.warning('no spare worker: %s', error)

    async def take(self, request: JobRequest) -> Worker:
        """The worker for a job, to be given back. WorkerDied when none can be started."""
        worker: Worker
        if self._services is not None and request.operation in UNSANDBOXED:
            what = f'{request.operation.capitalize()} of {request.image or "files"}'
            worker = await ServiceWorker.start(self._services, what, self._command)
        else:
            worker = self._take_spare() or ChildWorker(self._command)
        self._taken[worker] = request.asked_by
        return worker

    def _take_spare(self) -> ChildWorker | None:
        spare, self._spare = self._spare, None
        if spare is not None and not spare.alive:
            log.warning('spare worker %d is dead', spare.pid)
            spare.close()
            return None
        return spare

    async def give_back(self, worker: Worker, patience: float = 5.0) -> int:
        """The job is over: end its process, whatever state it is in. Its exit status."""
        try:
            return await worker.end(patience)
        finally:
            uid = self._taken.pop(worker)
            if worker.stuck:
                self._stuck[worker] = uid

    async def await_stuck(self, worker: Worker) -> None:
        """Until one that is stuck has ended after all."""
        await worker.wait_end()
        del self._stuck[worker]

    async def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await spare.end(5.0)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Choose a worker for each job: one started by a spawner or, for a restore, a service of its own."""

import os
from collections.abc import Sequence

from ckptd.jobs.interpreter import environment
from ckptd.jobs.service import Services, ServiceWorker
from ckptd.jobs.spawner import SpawnerClient
from ckptd.jobs.worker import COMMAND, ChildWorker, WorkerHandle
from ckptd.kernel.liveness import Liveness
from ckptd.protocol.requests import FreezerRequest, JobRequest

# operations that fail in a descendant of a sandboxed daemon: make the tree, check that it can be made, put files back,
# take names away. A dump fails there only for some trees, and its worker says so (messages.Confined).
UNSANDBOXED = frozenset({'restore', 'check-restore', 'recover', 'remove-names'})


def _slice_of(request: JobRequest) -> str:
    """Return the slice for a worker of root's daemon: that of an ordinary user's processes, or '' for the default."""
    uid = request.caller.uid
    return f'user-{uid}.slice' if uid and os.geteuid() == 0 else ''


def _feeds(request: JobRequest) -> bool:
    """Whether the worker feeds the watchdog of a unit, which takes CAP_SYS_ADMIN."""
    return isinstance(request, FreezerRequest) and bool(request.unit.watchdog_usec) and os.geteuid() == 0


class WorkerPool:
    """A pool of workers. command: a program to run instead of workers. services: a systemd manager that starts workers
    which must not be children of the daemon."""

    def __init__(self, command: Sequence[str] = (), services: Services | None = None) -> None:
        self._command, self._services = command, services
        self._liveness = Liveness()
        self._spawner = SpawnerClient(environment(), self._liveness.pidfd)
        self._taken: dict[WorkerHandle, JobRequest] = {}
        self._stuck: dict[WorkerHandle, int] = {}     # with the uid of the user who asked for the job

    @property
    def pids(self) -> tuple[int, ...]:
        """Pids of all workers and of the spawner. None of them may be in a tree that one of them freezes."""
        pids = (self._spawner.pid, *(worker.pid for worker in (*self._taken, *self._stuck)))
        return tuple(pid for pid in pids if pid)

    @property
    def requests(self) -> tuple[JobRequest, ...]:
        """Requests of the workers that were taken and not given back."""
        return tuple(self._taken.values())

    @property
    def stuck(self) -> tuple[int, ...]:
        """For each worker that was killed and does not end, the uid of the user who asked for its job."""
        return tuple(self._stuck.values())

    def start(self) -> None:
        """Start the spawner before the daemon opens any client's file, because a fork copies open files. WorkerDied."""
        self._spawner.start()

    async def take(self, request: JobRequest) -> WorkerHandle:
        """Return the worker for a job. It must be given back. WorkerDied if none can be started."""
        if (request.operation in UNSANDBOXED or _feeds(request)) and self.has_services:
            return await self.take_outside(request)
        worker = await ChildWorker.start(self._spawner, self._command)
        self._taken[worker] = request
        return worker

    @property
    def has_services(self) -> bool:
        """Whether there can be workers outside of the daemon's sandbox."""
        return self._services is not None

    async def take_outside(self, request: JobRequest) -> WorkerHandle:
        """Return a worker outside of the daemon's sandbox, as `take` does."""
        assert self._services is not None
        what = f'{request.operation.capitalize()} of {request.image_id or request.about or "files"}'
        worker = await ServiceWorker.start(self._services, what, self._command or COMMAND, self._liveness.pidfd,
                                           _slice_of(request))
        self._taken[worker] = request
        return worker

    async def give_back(self, worker: WorkerHandle, patience: float = 5.0) -> int:
        """End the process of a finished job, whatever its state. Return its exit status."""
        try:
            return await worker.end(patience)
        finally:
            request = self._taken.pop(worker)
            if worker.stuck:
                self._stuck[worker] = request.asked_by

    async def await_stuck(self, worker: WorkerHandle) -> None:
        """Wait until a stuck worker has ended after all."""
        await worker.wait_end()
        del self._stuck[worker]

    def close(self) -> None:
        """Close the pool, after all workers have been given back."""
        self._spawner.close()
        self._liveness.close()

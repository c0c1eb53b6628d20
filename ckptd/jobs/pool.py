# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets which worker: one that a spawner starts, or for a restore a service of its own."""

import os
from collections.abc import Sequence

from ckptd.jobs.interpreter import environment
from ckptd.jobs.service import Services, ServiceWorker
from ckptd.jobs.spawner import SpawnerClient
from ckptd.jobs.worker import COMMAND, ChildWorker, WorkerHandle
from ckptd.kernel.liveness import Liveness
from ckptd.protocol.messages import JobRequest

# what a sandboxed daemon's descendant could not do: make the tree, find out whether it could be made, put files back
UNSANDBOXED = frozenset({'restore', 'check-restore', 'recover'})


def _slice_of(request: JobRequest) -> str:
    """Where the processes of an ordinary user are, of root's systemd; '' for its default."""
    uid = request.caller.uid
    return f'user-{uid}.slice' if uid and os.geteuid() == 0 else ''


class WorkerPool:
    """command: a program instead of workers. services: a systemd that starts those which may not be our own."""

    def __init__(self, command: Sequence[str] = (), services: Services | None = None) -> None:
        self._command, self._services = command, services
        self._liveness = Liveness()
        self._spawner = SpawnerClient(environment(), self._liveness.pidfd)
        self._taken: dict[WorkerHandle, JobRequest] = {}
        self._stuck: dict[WorkerHandle, int] = {}     # and the uid of who asked for their job

    @property
    def pids(self) -> tuple[int, ...]:
        """Every worker that there is, and who starts them: none may be in a tree that one of them freezes."""
        pids = (self._spawner.pid, *(worker.pid for worker in (*self._taken, *self._stuck)))
        return tuple(pid for pid in pids if pid)

    @property
    def requests(self) -> tuple[JobRequest, ...]:
        """What the workers do that were taken and not given back."""
        return tuple(self._taken.values())

    @property
    def stuck(self) -> tuple[int, ...]:
        """For each worker that was killed and does not end, the uid of who asked for its job."""
        return tuple(self._stuck.values())

    def start(self) -> None:
        """Have the spawner, before any client's file is open here: a fork copies those. WorkerDied."""
        self._spawner.start()

    async def take(self, request: JobRequest) -> WorkerHandle:
        """The worker for a job, to be given back. WorkerDied when none can be started."""
        worker: WorkerHandle
        if self._services is not None and request.operation in UNSANDBOXED:
            what = f'{request.operation.capitalize()} of {request.image or "files"}'
            worker = await ServiceWorker.start(self._services, what, self._command or COMMAND, self._liveness.pidfd,
                                               _slice_of(request))
        else:
            worker = await ChildWorker.start(self._spawner, self._command)
        self._taken[worker] = request
        return worker

    async def give_back(self, worker: WorkerHandle, patience: float = 5.0) -> int:
        """The job is over: end its process, whatever state it is in. Its exit status."""
        try:
            return await worker.end(patience)
        finally:
            request = self._taken.pop(worker)
            if worker.stuck:
                self._stuck[worker] = request.asked_by

    async def await_stuck(self, worker: WorkerHandle) -> None:
        """Until one that is stuck has ended after all."""
        await worker.wait_end()
        del self._stuck[worker]

    def close(self) -> None:
        """Workers have been given back."""
        self._spawner.close()
        self._liveness.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""One worker that works on one job: how its messages change the job.

    Start -> Phase, Progress, UnitRequest, ScopeRequest, Log ... -> Finished | Failed | end-of-file (it died)
    Start -> Phase, Log ... -> Confined: the same with another worker, outside of the daemon's sandbox

A worker that sent Frozen before Finished holds a freeze: it stays until Thaw, releases the tree, and ends with status
0. A worker that sent Running has made a tree that no longer needs it. If the request has `wait`, Finished comes when
the root has ended.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from ckptd.errors import CkptError, NotSupported, WorkerDied
from ckptd.jobs.admission import Exclusive
from ckptd.jobs.pool import WorkerPool
from ckptd.jobs.state import JobRecord
from ckptd.jobs.worker import WorkerHandle
from ckptd.protocol import messages
from ckptd.protocol.messages import FromWorker
from ckptd.protocol.requests import DumpRequest, FreezerRequest, Request, UnitFacts
from ckptd.target import UnitTarget

log = logging.getLogger(__name__)
worker_log = logging.getLogger('ckptd.worker')


class Units(Protocol):
    """A systemd manager. Timeouts are in seconds. CkptError if it refuses."""
    async def freeze(self, unit: str, timeout: float) -> None: ...  # noqa: ASYNC109 - systemd's own, too
    async def thaw(self, unit: str) -> None: ...
    async def stop(self, unit: str, timeout: float) -> bool: ...  # noqa: ASYNC109 - until the stop begins
    async def await_stop(self, unit: str) -> None: ...
    async def await_end(self, unit: str) -> None: ...
    async def facts(self, unit: str) -> UnitFacts: ...
    async def scope(self, scope: str, pids: Sequence[int], description: str, slice_: str = '') -> None: ...


async def with_facts(request: Request, units: Units | None) -> Request:
    """Return a request with what the manager knows of its unit."""
    if units is None or not isinstance(request, FreezerRequest) or not isinstance(request.target, UnitTarget):
        return request
    try:
        return msgspec.structs.replace(request, unit=await units.facts(request.target.name))
    except CkptError as error:
        log.warning('%s is unknown to systemd: %s', request.target, error)
        return request


class Run:
    """A job and its worker. `changed` is called when the job begins and after each message that changed it.

    avoid: pids of the workers, including this one. None of them may be in the tree. pool: of the worker, None if no
    other one can take over.
    """

    def __init__(self, job: JobRecord, worker: WorkerHandle, units: Units | None,
                 changed: Callable[[FromWorker | None], None],
                 avoid: Sequence[int] = (), pool: WorkerPool | None = None) -> None:
        self.job, self.worker = job, worker
        self._pool = pool if pool and pool.has_services and isinstance(job.request, DumpRequest) else None
        self._fds: list[int] = []       # for another worker
        self._is_cancelled = False
        self._stopping = ''     # the unit that the job stops
        self.frozen: messages.Frozen | None = None
        self._units, self._changed = units, changed
        self._avoid = tuple(avoid)
        self._result: dict[str, Any] = {}
        self._clock = asyncio.get_running_loop().time

    def start(self, fds: Sequence[int]) -> None:
        """Send Start. WorkerDied if the worker is gone."""
        self.job.start(self._clock())
        if self._pool is not None:
            self._fds = [os.dup(fd) for fd in fds]      # of a dump that is a pidfd, which closes at once
        self._send_start(fds)

    def _send_start(self, fds: Sequence[int]) -> None:
        self.job.worker = self.worker.pid
        self._changed(None)
        request = self.job.request
        if isinstance(request, FreezerRequest):
            request = msgspec.structs.replace(request, avoid=(*request.avoid, *self._avoid))
        if isinstance(request, DumpRequest):
            request = msgspec.structs.replace(request, may_move=self._pool is not None)
        self.worker.send(messages.Start(request), fds)

    async def work(self) -> dict[str, Any]:
        """Receive messages until the result. Raise the error of the job, or WorkerDied if the worker ends without
        either."""
        try:
            return await self._work()
        finally:
            while self._fds:
                os.close(self._fds.pop())

    async def _work(self) -> dict[str, Any]:
        while (message := await self.worker.receive()) is not None:
            match message:
                case messages.Failed():
                    raise message.error()
                case messages.Finished():
                    if self._collect(message):
                        await self._await_stop()
                        return self._result
                case messages.Confined() if self._pool is not None:
                    await self._move(self._pool)
                case _:
                    await self._note(message)
        raise self.worker.died('it closed its socket before the job was over')

    async def _move(self, pool: WorkerPool) -> None:
        """Begin again with a worker outside of the daemon's sandbox."""
        self._pool = None
        try:
            worker, self.worker = self.worker, await pool.take_outside(self.job.request)
        except WorkerDied as error:     # the first worker is well
            raise NotSupported(f"the tree needs a worker outside of the daemon's sandbox: {error.message}",
                               hint=error.hint) from error
        await pool.give_back(worker)
        self._avoid = (*self._avoid, self.worker.pid)
        self._send_start(self._fds)
        if self._is_cancelled:
            self.cancel()

    async def hold(self) -> None:
        """Receive messages while the worker holds a freeze, until it closes its socket. Raise the error if it could not
        thaw."""
        while (message := await self.worker.receive()) is not None:
            if isinstance(message, messages.Failed):
                raise message.error()
            await self._note(message)

    def thaw(self) -> None:
        self.worker.send(messages.Thaw())

    def cancel(self) -> None:
        """Ask the worker to release the tree and leave nothing behind; `work` ends with Cancelled. A dead worker is
        ignored."""
        self._is_cancelled = True
        with contextlib.suppress(CkptError):
            self.worker.send(messages.Cancel())

    async def _await_stop(self) -> None:
        """Wait until the unit that the job has stopped is inactive, so that it can be started and restored again."""
        if self._stopping and self._units is not None:
            try:
                await self._units.await_stop(self._stopping)
            except CkptError as error:      # the tree is dead, and its image complete
                log.warning('%s: the end of %s is unknown: %s', self.job.name, self._stopping, error)

    def _collect(self, message: messages.Finished) -> bool:
        """Join a result that came in pieces. Return True when it is complete."""
        for key, value in message.result.items():
            if isinstance(value, list):
                self._result.setdefault(key, []).extend(value)
            else:
                self._result[key] = value
        return not message.more

    async def _note(self, message: FromWorker) -> None:
        match message:
            case messages.Phase(name):
                self.job.enter(name, self._clock())
            case messages.ProgressReport():
                self.job.advance(message, self._clock())
            case messages.Frozen() if isinstance(self.job.request, Exclusive):      # a user's worker may send any
                self.frozen = message
            case messages.Log(level, text):
                worker_log.log(level, '%s: %s', self.job.name, text)
            case messages.TreeRuns(root):
                self.job.root = root
            case messages.UnitRequest() | messages.ScopeRequest():
                self.worker.send(messages.UnitDone(await self._ask_systemd(message)))
        self._changed(message)

    async def _ask_systemd(self, wish: messages.UnitRequest | messages.ScopeRequest) -> str:
        """Carry out a request to systemd. Return systemd's error, or '' if it succeeded."""
        if self._units is None:
            return 'there is no systemd manager'
        try:
            match wish:
                case messages.UnitRequest(unit, 'freeze'):
                    await self._units.freeze(unit, self.job.request.timeout_usec / 1e6)
                case messages.UnitRequest(unit, 'thaw'):
                    await self._units.thaw(unit)
                case messages.UnitRequest(unit, 'stop'):
                    if await self._units.stop(unit, self.job.request.timeout_usec / 1e6):
                        self._stopping = unit
                case messages.ScopeRequest(scope, pids, slice_):
                    await self._units.scope(scope, pids, f'Restored from {self.job.request.image_id}', slice_)
        except CkptError as error:
            log.warning('%s: %s: %s', self.job.name, wish, error)
            return error.message
        return ''

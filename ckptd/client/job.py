# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job of the daemon, as its caller sees it: progress, result and end."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, Self, TypeVar

from ckptd.bus import wire
from ckptd.bus.client import ReceivedSignal
from ckptd.bus.message import NO_REPLY_EXPECTED
from ckptd.bus.names import BUS_NAME, JOB
from ckptd.client.daemon import DaemonProxy, outcome
from ckptd.client.events import JobNew, JobRemoved, Progress, Running, event_of
from ckptd.client.hub import KEPT, Hub
from ckptd.client.records import JobStatus, from_properties
from ckptd.errors import Unavailable

R = TypeVar('R')
Make = Callable[[Mapping[str, Any]], R]
OVER: Final = frozenset({'done', 'failed', 'cancelled'})


class Job(Generic[R]):
    """A job, made by a client. path: the path of its object. id: its number. root: pid of a restored tree's root once
    it runs, else 0.

        job = await ckptd.checkpoint('pid:42')
        async for event in job:             # Progress and Running, from its start until its end
            print(event)
        print((await job.wait()).image)
    """

    def __init__(self, daemon: DaemonProxy, hub: Hub, path: str, make: Make[R], number: int = 0) -> None:
        self.path, self.id, self.root = path, number, 0
        self._daemon, self._hub, self._make = daemon, hub, make
        self._unread: deque[Progress | Running] = deque(maxlen=KEPT)
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._properties: dict[str, Any] = {}       # the latest properties; all that matter once the job is over
        self._lost = ''
        self._unwanted = False
        hub.join(self)

    async def wait(self) -> R:
        """Wait for the end and return the result. It may be called again. CkptError: the job's error, Cancelled, or
        Unavailable if the daemon has gone. To stop waiting does not stop the job: see `cancel`."""
        await self._over.wait()
        await self._learn()
        if not self._outcome_known:
            raise Unavailable(f'{self._lost} before the job was over')
        return self._make(outcome(self._properties))

    async def cancel(self) -> None:
        """Ask the job to release its tree and leave nothing behind; `wait` then raises Cancelled. A finished job is not
        changed."""
        await self._daemon.cancel(self.path)

    async def status(self) -> JobStatus:
        """Read the status. NoSuchJob a while after the job has ended (KeepJobsSec)."""
        return from_properties(JobStatus, await self._daemon.job_properties(self.path))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Progress | Running:
        while not self._unread:
            if not self._over.is_set():
                self._news.clear()
                await self._news.wait()
            elif self._outcome_known or self._lost:
                raise StopAsyncIteration
            else:
                await self._learn()     # a short restore may have run its tree before the subscription
        return self._unread.popleft()

    # ------------------------------------------------------------ called by the hub and by the maker of the job

    def hear(self, signal: ReceivedSignal) -> None:
        """Handle a signal of the daemon, whether it is about this job or not."""
        if signal.path == self.path and signal.member == 'PropertiesChanged' and signal.args[0] == JOB:
            self._changed(signal.args[1])
        match event_of(signal):
            case JobNew(number, self.path):
                self.id = number
                if self._unwanted:
                    self._cancel_unheard()
            case Running(self.path, root) as event if root != self.root:     # each change of state repeats it
                self.root = root
                self._add(event)
            case Progress(self.path) as event:
                self._add(event)
            case JobRemoved(number, self.path):
                self.id = number
                self._end()

    def left(self) -> bool:
        """End with the daemon, if this job is still wanted. A job of the next daemon with the same path is another
        one."""
        if self._unwanted:
            self._hub.leave(self)
        return self._unwanted

    def lost(self, reason: str) -> None:
        """Note that the daemon is gone."""
        self._lost = reason
        self._end()

    def settle(self, properties: Mapping[str, Any]) -> None:
        """Take over all properties of the job."""
        root = properties.get('Root', 0)
        if root and root != self.root:
            self.root = root
            self._add(Running(self.path, root))
        self._changed(properties)
        if self._outcome_known:
            self._end()

    def abandon(self) -> None:
        """Cancel the job if it exists. Its caller was interrupted before the answer came."""
        self._unwanted = True
        if self.id:
            self._cancel_unheard()

    def forget(self) -> None:
        """Drop a job that was never made."""
        self._hub.leave(self)

    async def _learn(self) -> None:
        """Read how the job ended, unless signals have told it or the daemon is gone."""
        if not self._outcome_known and not self._lost:
            self.settle(await self._daemon.job_properties(self.path))

    @property
    def _outcome_known(self) -> bool:
        return self._properties.get('State') in OVER

    def _changed(self, values: Mapping[str, Any]) -> None:
        self._properties.update(values)
        if self._outcome_known and self._over.is_set():
            self._hub.leave(self)

    def _add(self, event: Progress | Running) -> None:
        self._unread.append(event)
        self._news.set()

    def _end(self) -> None:
        """Mark the job as over. JobRemoved comes first, the last PropertiesChanged a moment later."""
        self._over.set()
        self._news.set()
        if self._outcome_known or self._unwanted:
            self._hub.leave(self)

    def _cancel_unheard(self) -> None:
        self._daemon.client.connection.send(
            wire.make_call(BUS_NAME, self.path, JOB, 'Cancel', 'a{sv}', [{}], NO_REPLY_EXPECTED))

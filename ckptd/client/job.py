# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job of the daemon, as whoever started it sees it: how far it is, its result, its end."""

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
    """Made by a client. path: of its object. id: its number. root: pid of a restored tree's root once it runs, else 0.

        job = await ckptd.checkpoint('pid:42')
        async for event in job:             # Progress and Running, until it has ended; those since it was begun
            print(event)
        print((await job.wait()).image)
    """

    def __init__(self, daemon: DaemonProxy, hub: Hub, path: str, make: Make[R], number: int = 0) -> None:
        self.path, self.id, self.root = path, number, 0
        self._daemon, self._hub, self._make = daemon, hub, make
        self._unread: deque[Progress | Running] = deque(maxlen=KEPT)
        self._news, self._over = asyncio.Event(), asyncio.Event()
        self._properties: dict[str, Any] = {}       # the last that was told of them, all that matter once it is over
        self._lost = ''
        self._unwanted = False
        hub.join(self)

    async def wait(self) -> R:
        """Its result, once it has ended; that may be asked for again. CkptError: what it failed with, Cancelled,
        Unavailable when the daemon has gone before. To stop waiting does not stop the job: see `cancel`."""
        await self._over.wait()
        await self._learn()
        if not self._is_told:
            raise Unavailable(f'{self._lost} before the job was over')
        return self._make(outcome(self._properties))

    async def cancel(self) -> None:
        """Ask it to let go and leave nothing; `wait` then raises Cancelled. One that is over stays as it is."""
        await self._daemon.cancel(self.path)

    async def status(self) -> JobStatus:
        """NoSuchJob a while after it has ended (KeepJobsSec)."""
        return from_properties(JobStatus, await self._daemon.job_properties(self.path))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Progress | Running:
        while not self._unread:
            if not self._over.is_set():
                self._news.clear()
                await self._news.wait()
            elif self._is_told or self._lost:
                raise StopAsyncIteration
            else:
                await self._learn()     # of a short restore, that the tree runs
        return self._unread.popleft()

    # ------------------------------------------------------------ told by the hub and by who made it

    def hear(self, signal: ReceivedSignal) -> None:
        """A signal of the daemon, of this job or not."""
        if signal.path == self.path and signal.member == 'PropertiesChanged' and signal.args[0] == JOB:
            self._changed(signal.args[1])
        match event_of(signal):
            case JobNew(number, self.path):
                self.id = number
                if self._unwanted:
                    self._cancel_unheard()
            case Running(self.path, root) as event if root != self.root:     # each change of state says it again
                self.root = root
                self._add(event)
            case Progress(self.path) as event:
                self._add(event)
            case JobRemoved(number, self.path):
                self.id = number
                self._end()

    def left(self) -> bool:
        """It ends with its daemon, and somebody waits for it. One of this path that the next daemon has is another."""
        if self._unwanted:
            self._hub.leave(self)
        return self._unwanted

    def lost(self, reason: str) -> None:
        """The daemon is gone."""
        self._lost = reason
        self._end()

    def settle(self, properties: Mapping[str, Any]) -> None:
        """What was asked about it: all its properties."""
        root = properties.get('Root', 0)
        if root and root != self.root:
            self.root = root
            self._add(Running(self.path, root))
        self._changed(properties)
        if self._is_told:
            self._end()

    def abandon(self) -> None:
        """Who wanted it was interrupted before it was known to exist; if it does, it is cancelled."""
        self._unwanted = True
        if self.id:
            self._cancel_unheard()

    def forget(self) -> None:
        """It never was."""
        self._hub.leave(self)

    async def _learn(self) -> None:
        """How it ended, unless the signals have told or cannot any more."""
        if not self._is_told and not self._lost:
            self.settle(await self._daemon.job_properties(self.path))

    @property
    def _is_told(self) -> bool:
        return self._properties.get('State') in OVER

    def _changed(self, values: Mapping[str, Any]) -> None:
        self._properties.update(values)
        if self._is_told and self._over.is_set():
            self._hub.leave(self)

    def _add(self, event: Progress | Running) -> None:
        self._unread.append(event)
        self._news.set()

    def _end(self) -> None:
        """JobRemoved comes first, the last PropertiesChanged a moment later."""
        self._over.set()
        self._news.set()
        if self._is_told or self._unwanted:
            self._hub.leave(self)

    def _cancel_unheard(self) -> None:
        self._daemon.client.connection.send(
            wire.make_call(BUS_NAME, self.path, JOB, 'Cancel', 'a{sv}', [{}], NO_REPLY_EXPECTED))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""One subscription of a connection to the signals of ckptd, told to all of the program who listen."""

import asyncio
import contextlib
from collections import deque
from typing import Protocol, Self

from ckptd.bus.client import ReceivedSignal
from ckptd.bus.names import BUS_NAME
from ckptd.client.daemon import DaemonProxy
from ckptd.client.events import Event, event_of
from ckptd.errors import Unavailable

KEPT = 1024     # events that nobody has read yet; of more the oldest are lost


class Hearer(Protocol):
    """Who listens. left: the daemon has ended; whether who comes after it will do as well. lost: the daemon or the bus
    is gone, there will be nothing more."""

    def hear(self, signal: ReceivedSignal) -> None: ...
    def left(self) -> bool: ...
    def lost(self, reason: str) -> None: ...


class Hub:
    """Told by the bus. After `gone` says why, it is of no use any more.

    A daemon that nobody needs ends, and the next one knows who listens. A job ends with its daemon: who waits for one
    hears that, and all others with him.
    """

    def __init__(self) -> None:
        self.gone = ''
        self._hearers: list[Hearer] = []

    def join(self, hearer: Hearer) -> None:
        if self.gone:
            hearer.lost(self.gone)
        else:
            self._hearers.append(hearer)

    def leave(self, hearer: Hearer) -> None:
        """Again: nothing."""
        if hearer in self._hearers:
            self._hearers.remove(hearer)

    def add(self, signal: ReceivedSignal) -> None:
        for hearer in list(self._hearers):
            hearer.hear(signal)

    def left(self, reason: str) -> bool:
        """The daemon has ended. Whether all who listen go on with the next."""
        goes_on = [hearer.left() for hearer in list(self._hearers)]       # each hears of it
        if not all(goes_on):
            self.end(reason)
        return not self.gone

    def end(self, reason: str) -> None:
        self.gone = self.gone or reason
        for hearer in list(self._hearers):
            self.leave(hearer)
            hearer.lost(reason)


class Listening:
    """The hub of a connection, made when it is first wanted, and anew when it is gone."""

    def __init__(self, daemon: DaemonProxy) -> None:
        self._daemon = daemon
        self._hub: Hub | None = None
        self._stack = contextlib.AsyncExitStack()
        self._turn = asyncio.Lock()

    async def hub(self) -> Hub:
        """Unavailable where there is no daemon."""
        async with self._turn:
            if self._hub is not None:
                # what is on its way comes before the answer, also that the daemon has left
                try:
                    await self._daemon.client.owner(BUS_NAME)
                except Unavailable:
                    if not self._hub.gone:
                        await self._daemon.client.owner(BUS_NAME, start=True)
            if self._hub is None or self._hub.gone:
                await self._stack.aclose()
                hub = Hub()
                await self._stack.enter_async_context(self._daemon.listening(hub))
                self._hub = hub
            return self._hub

    async def close(self) -> None:
        """Who still listens is told that it is over."""
        if self._hub is not None:
            self._hub.end('the connection was closed')
        await self._stack.aclose()


class Events:
    """Events in the order they came, of these kinds or of all; those of the daemon that is started after one that has
    ended follow. Ends with Unavailable when the bus is gone, or the daemon at work on a job that this client waits for.
    """
    def __init__(self, kinds: tuple[type[Event], ...] = ()) -> None:
        self._kinds = kinds
        self._unread: deque[Event] = deque(maxlen=KEPT)
        self._news = asyncio.Event()
        self._lost = ''

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._unread:
            if self._lost:
                raise Unavailable(self._lost)
            self._news.clear()
            await self._news.wait()
        return self._unread.popleft()

    def hear(self, signal: ReceivedSignal) -> None:
        event = event_of(signal)
        if event is not None and (not self._kinds or isinstance(event, self._kinds)):
            self._unread.append(event)
            self._news.set()

    def left(self) -> bool:
        """The next daemon has events, too."""
        return True

    def lost(self, reason: str) -> None:
        self._lost = reason
        self._news.set()

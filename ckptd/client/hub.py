# SPDX-License-Identifier: LGPL-2.1-or-later
"""One subscription of a connection to the signals of ckptd, distributed to all listeners in the program."""

import asyncio
import contextlib
from collections import deque
from typing import Protocol, Self

from ckptd.bus.client import ReceivedSignal
from ckptd.bus.names import BUS_NAME
from ckptd.client.daemon import DaemonProxy
from ckptd.client.events import Event, event_of
from ckptd.errors import Unavailable

KEPT = 1024     # events that were not read yet; of more, the oldest are lost


class Subscriber(Protocol):
    """A listener. left: the daemon has ended; return whether the listener goes on with the next daemon. lost: the
    daemon or the bus is gone, and nothing more will come."""

    def hear(self, signal: ReceivedSignal) -> None: ...
    def left(self) -> bool: ...
    def lost(self, reason: str) -> None: ...


class Hub:
    """A distributor of signals. Once `gone` has a reason, it is finished.

    An idle daemon exits, and the next one knows the listeners. A job ends with its daemon, so the code that waits for a
    job learns of it. All other listeners end with it.
    """

    def __init__(self) -> None:
        self.gone = ''
        self._subscribers: list[Subscriber] = []

    def join(self, subscriber: Subscriber) -> None:
        if self.gone:
            subscriber.lost(self.gone)
        else:
            self._subscribers.append(subscriber)

    def leave(self, subscriber: Subscriber) -> None:
        """Remove a listener. A second call does nothing."""
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)

    def add(self, signal: ReceivedSignal) -> None:
        for subscriber in list(self._subscribers):
            subscriber.hear(signal)

    def left(self, reason: str) -> bool:
        """Handle the end of the daemon. Return whether all listeners go on with the next one."""
        goes_on = [subscriber.left() for subscriber in list(self._subscribers)]       # call each of them
        if not all(goes_on):
            self.end(reason)
        return not self.gone

    def end(self, reason: str) -> None:
        self.gone = self.gone or reason
        for subscriber in list(self._subscribers):
            self.leave(subscriber)
            subscriber.lost(reason)


class Listening:
    """The hub of a connection. It is made on first use, and again after its end."""

    def __init__(self, daemon: DaemonProxy) -> None:
        self._daemon = daemon
        self._hub: Hub | None = None
        self._stack = contextlib.AsyncExitStack()
        self._turn = asyncio.Lock()

    async def hub(self) -> Hub:
        """Return the hub. Unavailable if there is no daemon."""
        async with self._turn:
            if self._hub is not None:
                # signals on their way arrive before the answer, including one that the daemon has left
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
        """End the hub. All listeners are told."""
        if self._hub is not None:
            self._hub.end('the connection was closed')
        await self._stack.aclose()


class Events:
    """Events in the order they came, of these kinds or of all. They continue with the next daemon after one has ended.
    Raises Unavailable when the bus is gone, or a daemon that works on a job this client waits for."""
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
        """Go on: the next daemon has events, too."""
        return True

    def lost(self, reason: str) -> None:
        self._lost = reason
        self._news.set()

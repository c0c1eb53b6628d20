# SPDX-License-Identifier: LGPL-2.1-or-later
"""One method call as its handler sees it: who calls, what he may see, whether he is still there."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from ckptd.bus.export import Viewer
from ckptd.bus.peers import Peers, SeesAll
from ckptd.bus.wire import Received
from ckptd.protocol.messages import Caller


class Call:
    """One method call while it is served."""
    __slots__ = ('_peers', '_sees_all', '_viewer', 'answered', 'audited', 'message')

    def __init__(self, message: Received, peers: Peers, sees_all: SeesAll) -> None:
        self.message, self._peers, self._sees_all = message, peers, sees_all
        self.answered = not message.wants_reply
        self._viewer: Viewer | None = None
        self.audited = False        # there is a line in the log that it was allowed, or not

    @property
    def sender(self) -> str:
        """Unique name of the caller, ':1.42'; the bus vouches for it."""
        return self.message.sender

    @property
    def interactive(self) -> bool:
        """The caller waits long enough for a person to be asked (ALLOW_INTERACTIVE_AUTHORIZATION)."""
        return self.message.interactive

    async def credentials(self) -> Caller:
        """Who calls, as the bus says."""
        return await self._peers.caller(self.sender)

    async def viewer(self, can_see: Callable[[Viewer], bool] | None = None) -> Viewer:
        """What the caller may see, which stays so for this call. can_see: what it is to be; nobody is asked where it
        needs no more than its own."""
        own = Viewer(await self._peers.uid(self.sender))
        if can_see is not None and can_see(own):
            return own
        if self._viewer is None:
            self._viewer = await self._peers.viewer(self.sender, self._sees_all)
        return self._viewer

    async def when_gone(self, callback: Callable[[], None]) -> None:
        """Call back once, when the caller leaves the bus; at once if it has left."""
        await self._peers.when_gone(self.sender, callback)

    def never_mind(self, callback: Callable[[], None]) -> None:
        """No call back any more."""
        self._peers.never_mind(self.sender, callback)

    @contextlib.asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """Cancel the block when the caller leaves the bus: nobody waits for its result any more."""
        task = asyncio.current_task()
        assert task is not None

        def leave() -> None:
            task.cancel()

        await self.when_gone(leave)
        try:
            yield
        finally:
            self.never_mind(leave)

    def take(self, fd: int) -> int:
        """Make an fd argument the handler's own; all others are closed when it returns."""
        return self.message.fds.take(fd)

    def __str__(self) -> str:
        return f'{self.message.interface}.{self.message.member} at {self.message.path} of {self.sender}'

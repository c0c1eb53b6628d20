# SPDX-License-Identifier: LGPL-2.1-or-later
"""A method call as its handler sees it: the caller, what the caller may see, and whether the caller is still there."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from ckptd.bus.export import Viewer
from ckptd.bus.peers import Peers, SeesAll
from ckptd.bus.wire import Received
from ckptd.protocol.requests import Caller


class Call:
    """One method call while it is served."""
    __slots__ = ('_peers', '_sees_all', '_viewer', 'answered', 'audited', 'message')

    def __init__(self, message: Received, peers: Peers, sees_all: SeesAll) -> None:
        self.message, self._peers, self._sees_all = message, peers, sees_all
        self.answered = not message.wants_reply
        self._viewer: Viewer | None = None
        self.audited = False        # the decision, allowed or refused, is in the log

    @property
    def sender(self) -> str:
        """Unique name of the caller, such as ':1.42'. The bus vouches for it."""
        return self.message.sender

    @property
    def interactive(self) -> bool:
        """Whether the caller waits long enough for a person to be asked (ALLOW_INTERACTIVE_AUTHORIZATION)."""
        return self.message.interactive

    async def credentials(self) -> Caller:
        """Return the credentials of the caller, as the bus reports them."""
        return await self._peers.caller(self.sender)

    async def viewer(self, can_see: Callable[[Viewer], bool] | None = None) -> Viewer:
        """Return what the caller may see. The answer stays the same for this call.

        can_see: whether a viewer sees the object in question. polkit is not asked if the caller sees it without more
        rights.
        """
        own = Viewer(await self._peers.uid(self.sender))
        if can_see is not None and can_see(own):
            return own
        if self._viewer is None:
            self._viewer = await self._peers.viewer(self.sender, self._sees_all)
        return self._viewer

    async def when_gone(self, callback: Callable[[], None]) -> None:
        """Call back once when the caller leaves the bus, or at once if it has left."""
        await self._peers.when_gone(self.sender, callback)

    def never_mind(self, callback: Callable[[], None]) -> None:
        """Cancel a callback of `when_gone`."""
        self._peers.never_mind(self.sender, callback)

    @contextlib.asynccontextmanager
    async def attended(self) -> AsyncIterator[None]:
        """Cancel the block when the caller leaves the bus, since no one waits for its result."""
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
        """Hand an fd argument over to the handler. All other fds are closed when the handler returns."""
        return self.message.fds.take(fd)

    def __str__(self) -> str:
        return f'{self.message.interface}.{self.message.member} at {self.message.path} of {self.sender}'

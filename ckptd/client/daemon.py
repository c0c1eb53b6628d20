# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls of ckptd with plain values, and the life of its jobs. ckptctl and the typed clients use them."""

import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ckptd.bus.client import Client, Signals, Sink
from ckptd.bus.message import ALLOW_INTERACTIVE
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT
from ckptd.errors import CkptError, NoSuchJob, from_details

QUICK: Final = 30.0             # seconds for an answer that needs no work
PERSON: Final = 600.0           # seconds until a person has typed a password, or not
LONG: Final = 24 * 3600.0       # seconds for an answer whose work grows with the tree or the image


@dataclass(frozen=True, slots=True)
class DaemonProxy:
    """ckptd at the other end of a bus connection. Values are plain: no variants, dicts for a{sv}."""
    client: Client
    flags: int = 0    # of each call; ALLOW_INTERACTIVE lets polkit ask a person

    async def manager(self, method: str, signature: str = '', *args: Any, seconds: float = QUICK) -> Any:
        """Call a method of the manager. Return its result, None if it has none."""
        return await self.call(ROOT, MANAGER, method, signature, *args, seconds=seconds)

    async def manager_properties(self) -> dict[str, Any]:
        return await self.client.properties(BUS_NAME, ROOT, MANAGER)

    async def image(self, image: str, method: str, signature: str = '', *args: Any, seconds: float = QUICK) -> Any:
        """Call a method of an image. GetImage returns its path, and gives the best error if there is no such image."""
        path = await self.manager('GetImage', 's', image)
        return await self.call(path, IMAGE, method, signature, *args, seconds=seconds)

    async def image_properties(self, image: str) -> dict[str, Any]:
        return await self.client.properties(BUS_NAME, await self.manager('GetImage', 's', image), IMAGE)

    async def job_properties(self, path: str) -> dict[str, Any]:
        return await self.client.properties(BUS_NAME, path, JOB)

    async def call(self, path: str, interface: str, method: str, signature: str = '', *args: Any,
                   seconds: float = QUICK) -> Any:
        """Call a method of any object. seconds: time limit for the answer."""
        return await self.client.call(BUS_NAME, path, interface, method, signature, *args,
                                      timeout=self._patience(seconds), flags=self.flags)

    async def call_for_fd(self, path: str, interface: str, method: str, signature: str = '', *args: Any,
                          seconds: float = QUICK) -> int:
        """Call a method that answers an fd. The caller closes the fd."""
        return await self.client.call_for_fd(BUS_NAME, path, interface, method, signature, *args,
                                             timeout=self._patience(seconds), flags=self.flags)

    def _patience(self, seconds: float) -> float:
        """Return the time limit, which is longer if a person may be asked."""
        return max(seconds, PERSON) if self.flags & ALLOW_INTERACTIVE else seconds

    @contextlib.asynccontextmanager
    async def signals(self, *, follow: bool = False) -> AsyncIterator[Signals]:
        """Receive all signals that the daemon sends to this caller. follow: also those of daemons started later."""
        signals = Signals(follow=follow)
        async with self.listening(signals):
            yield signals

    @contextlib.asynccontextmanager
    async def listening(self, sink: Sink) -> AsyncIterator[None]:
        """Deliver the signals of the daemon to a sink."""
        async with self.client.listening(sink, BUS_NAME, ROOT):
            yield

    async def cancel(self, path: str) -> None:
        """Cancel the job at this path. Do nothing if it ended meanwhile."""
        with contextlib.suppress(NoSuchJob):
            await self.call(path, JOB, 'Cancel', 'a{sv}', {})


def new_token(prefix: str) -> str:
    """Return a new handle_token, which no other call of any process with this prefix has."""
    return f'{prefix}_{os.getpid()}_{secrets.token_hex(4)}'


def outcome(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Result of a finished job from its properties, or raise its error."""
    if properties['State'] == 'done':
        return dict(properties['Result'])
    error = dict(properties['Error'])
    failed: CkptError = from_details(error.pop('name', ''), error.pop('message', f'the job ended as '
                                                                       f'{properties["State"]}'), error)
    raise failed

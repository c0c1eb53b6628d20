# SPDX-License-Identifier: LGPL-2.1-or-later
"""One run of ckptctl: its arguments, its output, and the daemon it talks to."""

import argparse
import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.bus.client import Client, Signal, Signals, connect
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT
from ckptd.cli.output import Output
from ckptd.errors import Unavailable

__all__ = ['LONG', 'Daemon', 'Session', 'Signal', 'Signals', 'until_interrupted']

QUICK = 30.0            # seconds for an answer that needs no work
LONG = 24 * 3600.0      # for one whose work is as large as the tree or the image


@dataclass(frozen=True, slots=True)
class Daemon:
    """ckptd at the other end of a bus connection. Values are plain: no variants, dicts for a{sv}."""
    client: Client

    async def manager(self, method: str, signature: str = '', *args: Any, seconds: float = QUICK) -> Any:
        """Call a method of the manager; its result, None if it has none."""
        return await self.call(ROOT, MANAGER, method, signature, *args, seconds=seconds)

    async def manager_properties(self) -> dict[str, Any]:
        return await self.client.properties(BUS_NAME, ROOT, MANAGER)

    async def image(self, image: str, method: str, signature: str = '', *args: Any, seconds: float = QUICK) -> Any:
        """Call a method of an image; GetImage knows its path, and says it best when there is none."""
        path = await self.manager('GetImage', 's', image)
        return await self.call(path, IMAGE, method, signature, *args, seconds=seconds)

    async def image_properties(self, image: str) -> dict[str, Any]:
        return await self.client.properties(BUS_NAME, await self.manager('GetImage', 's', image), IMAGE)

    async def job_properties(self, path: str) -> dict[str, Any]:
        return await self.client.properties(BUS_NAME, path, JOB)

    async def call(self, path: str, interface: str, method: str, signature: str = '', *args: Any,
                   seconds: float = QUICK) -> Any:
        """Call a method of any object; seconds: until there has to be an answer."""
        return await self.client.call(BUS_NAME, path, interface, method, signature, *args, timeout=seconds)

    @contextlib.asynccontextmanager
    async def signals(self) -> AsyncIterator[Signals]:
        """Everything that the daemon says from now on."""
        async with self.client.signals(BUS_NAME, ROOT) as signals:
            yield signals


@dataclass(slots=True)
class Interrupts:
    """What Ctrl-C, SIGTERM and SIGHUP do: they cancel the command, unless there is a taker that wants this one."""
    taker: Callable[[signal.Signals], bool] | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """What every command gets."""
    args: argparse.Namespace
    out: Output
    interrupts: Interrupts = field(default_factory=Interrupts)

    @contextlib.asynccontextmanager
    async def daemon(self) -> AsyncIterator[Daemon]:
        """The daemon that the command line asks for, started for this command with --standalone."""
        if self.args.standalone:
            async with self.private_daemon(self.args.spool) as daemon:
                yield daemon
            return
        try:
            client = await connect(self.args.address or self.args.bus)
        except Unavailable as error:
            raise Unavailable(error.message, hint='use --standalone, which brings a bus of its own') from error
        async with client:
            yield Daemon(client)

    @contextlib.asynccontextmanager
    async def private_daemon(self, spool: str | Path | None) -> AsyncIterator[Daemon]:
        """A bus and a daemon of our own, until the context ends."""
        from ckptd.cli.standalone import private_daemon
        async with private_daemon(spool) as address, await connect(address) as client:
            yield Daemon(client)


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C (or SIGTERM) ends the block, as what it waits for; main() turned the signal into a cancellation."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            raise
        task.uncancel()

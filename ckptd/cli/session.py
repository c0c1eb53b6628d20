# SPDX-License-Identifier: LGPL-2.1-or-later
"""One run of ckptctl: its arguments, its output, and the daemon it talks to."""

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptd.bus.client import ReceivedSignal, Signals, connect
from ckptd.bus.message import ALLOW_INTERACTIVE
from ckptd.cli.output import Output
from ckptd.client.daemon import LONG, DaemonProxy
from ckptd.errors import Unavailable

__all__ = ['LONG', 'DaemonProxy', 'ReceivedSignal', 'Session', 'Signals', 'until_interrupted']


@dataclass(slots=True)
class Interrupts:
    """The effect of Ctrl-C, SIGTERM and SIGHUP: they cancel the command, unless `taker` handles the signal and returns
    True."""
    taker: Callable[[signal.Signals], bool] | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """The context of a command."""
    args: argparse.Namespace
    out: Output
    interrupts: Interrupts = field(default_factory=Interrupts)

    @contextlib.asynccontextmanager
    async def daemon(self) -> AsyncIterator[DaemonProxy]:
        """Connect to the daemon that the command line asks for. With --standalone, start one for this command."""
        if self.args.standalone:
            async with self.private_daemon(self.args.spool) as daemon:
                yield daemon
            return
        try:
            client = await connect(self.args.address or self.args.bus)
        except Unavailable as error:
            raise Unavailable(error.message, hint='use --standalone, which starts a bus of its own') from error
        async with client:
            # on a terminal polkit may ask the user
            yield DaemonProxy(client, ALLOW_INTERACTIVE if sys.stdin.isatty() else 0)

    @contextlib.asynccontextmanager
    async def private_daemon(self, spool: str | Path | None) -> AsyncIterator[DaemonProxy]:
        """Run a private bus and a private daemon until the context ends."""
        from ckptd.cli.standalone import private_daemon
        async with private_daemon(spool) as address, await connect(address) as client:
            yield DaemonProxy(client)


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """End the block normally on Ctrl-C or SIGTERM. main() has turned the signal into a cancellation."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            raise
        task.uncancel()

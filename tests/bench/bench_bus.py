# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many calls a second the daemon answers: ListJobs, by clients that each wait for their answer."""

import asyncio
import time
from contextlib import AsyncExitStack

from ckptd.bus.client import Client, connect
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from tests.lib.bus import Daemon

SECONDS = 1.0


async def _call(client: Client, until: float) -> int:
    done = 0
    while time.monotonic() < until:
        await client.call(BUS_NAME, ROOT, MANAGER, 'ListJobs')
        done += 1
    return done


async def _calls(daemon: Daemon, clients: int) -> float:
    async with AsyncExitStack() as stack:
        connected = [await stack.enter_async_context(await connect(daemon.address)) for _ in range(clients)]
        until = time.monotonic() + SECONDS
        return sum(await asyncio.gather(*(_call(client, until) for client in connected))) / SECONDS


def run(daemon: Daemon, clients: tuple[int, ...] = (1, 20)) -> dict[int, float]:
    """Calls a second by number of clients, which share one processor with each other."""
    return {count: asyncio.run(_calls(daemon, count)) for count in clients}

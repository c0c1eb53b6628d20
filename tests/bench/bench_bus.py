# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many calls a second the daemon answers, and how long one waits: clients that each wait for their answer.

All clients share one process, and one processor with each other: of a hundred, most of the time of a call is their own.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from statistics import median, quantiles
from typing import Any, NamedTuple

from ckptd.bus.client import Client, connect
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from tests.lib.bus import Daemon

SECONDS = 1.0
CLIENTS = (1, 10, 100)
PEER, PROPERTIES = 'org.freedesktop.DBus.Peer', 'org.freedesktop.DBus.Properties'
CALLS: dict[str, tuple[str, str, str, tuple[Any, ...]]] = {
    'Ping': (PEER, 'Ping', '', ()),
    'GetAll': (PROPERTIES, 'GetAll', 's', (MANAGER,)),
    'ListImages': (MANAGER, 'ListImages', '', ()),
    'Scan': (MANAGER, 'Scan', 'sa{sv}', ('self', {})),      # each by a worker of its own
}
HEAD = f'{"call":<12} {"clients":>7} {"calls/s":>9} {"median ms":>10} {"p99 ms":>9}'


class Row(NamedTuple):
    """median, p99: seconds from a call to its answer."""
    call: str
    clients: int
    rate: float
    median: float
    p99: float

    def facts(self) -> dict[str, Any]:
        """For a program: microseconds."""
        return {'call': self.call, 'clients': self.clients, 'calls_per_second': self.rate,
                'median_time': self.median * 1e6, 'p99_time': self.p99 * 1e6}

    def line(self) -> str:
        return (f'{self.call:<12} {self.clients:>7} {self.rate:>9.0f} {self.median * 1e3:>10.2f} '
                f'{self.p99 * 1e3:>9.2f}')


async def _call(client: Client, call: str, until: float) -> list[float]:
    interface, member, signature, arguments = CALLS[call]
    times = []
    while (start := time.monotonic()) < until or len(times) < 2:
        await client.call(BUS_NAME, ROOT, interface, member, signature, *arguments)
        times.append(time.monotonic() - start)
    return times


async def _measure(daemon: Daemon, call: str, clients: int) -> Row:
    async with AsyncExitStack() as stack:
        connected = [await stack.enter_async_context(await connect(daemon.address)) for _ in range(clients)]
        start = time.monotonic()
        waits = await asyncio.gather(*(_call(client, call, start + SECONDS) for client in connected))
        took = time.monotonic() - start
    times = [one for wait in waits for one in wait]
    return Row(call, clients, len(times) / took, median(times), quantiles(times, n=100)[98])


def run(daemon: Daemon, clients: Sequence[int] = CLIENTS) -> list[Row]:
    """A row for each call and number of clients."""
    return [asyncio.run(_measure(daemon, call, count)) for call in CALLS for count in clients]

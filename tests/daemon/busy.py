# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client that keeps a daemon busy: python -m tests.daemon.busy ADDRESS PART ARGUMENT...

A process of its own, so that what it decodes is no work of the daemon's.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from ckptd.bus.client import Client, Signals, connect
from ckptd.bus.names import BUS_NAME, IMAGE, JOB, MANAGER, ROOT, image_path

MANAGED = 'org.freedesktop.DBus.ObjectManager'
PROPERTIES = 'org.freedesktop.DBus.Properties'
TIMES = 10              # of each kind of call
CHECKPOINTS = 20
JOBS = 500


class Busy:
    def __init__(self, client: Client, signals: Signals) -> None:
        self._client, self._signals = client, signals

    async def manager(self, member: str, signature: str = '', *args: Any) -> Any:
        return await self._client.call(BUS_NAME, ROOT, MANAGER, member, signature, *args, timeout=200)

    async def everything(self) -> dict[str, Any]:
        return dict(await self._client.call(BUS_NAME, ROOT, MANAGED, 'GetManagedObjects', timeout=200))

    async def ended(self, job: str) -> str:
        async for signal in self._signals:
            if signal.member == 'JobRemoved' and signal.args[1] == job:
                return str(signal.args[2])
        raise AssertionError(job)

    async def images(self, count: str) -> None:
        """A large spool, looked at in every way."""
        for _ in range(TIMES):
            assert len(await self.manager('ListImages')) == int(count)
            assert len(await self.everything()) >= int(count)
            await self._client.call(BUS_NAME, f'{ROOT}/image', 'org.freedesktop.DBus.Introspectable', 'Introspect')
        rows = await self.manager('ListImages')
        for row in rows[:100]:
            assert (await self._client.properties(BUS_NAME, row['path'], IMAGE))['Id'] == row['image']

    async def arrival(self, count: str) -> None:
        """Images that appear: until all are there."""
        while len(await self.manager('ListImages')) < int(count):
            await anext(self._signals)

    async def departure(self) -> None:
        """Images that go: until none is left."""
        while await self.manager('ListImages'):
            await anext(self._signals)

    async def trees(self, small: str, large: str, size: str) -> None:
        """Real workers: many checkpoints of a small tree; a scan, a checkpoint and an export of a large one."""
        for _ in range(CHECKPOINTS):
            assert await self.ended(await self.manager('Checkpoint', 'sa{sv}', small, {})) == 'done'
        assert len(await self.manager('Scan', 'sa{sv}', large, {})) == int(size)
        await self.manager('Check', 'sa{sv}', large, {})
        job = await self.manager('Checkpoint', 'sa{sv}', large, {})
        assert await self.ended(job) == 'done'
        path = image_path((await self._client.properties(BUS_NAME, job, JOB))['Image'])
        assert len(await self._client.call(BUS_NAME, path, IMAGE, 'Tree', timeout=200)) == int(size)
        with open(os.devnull, 'wb') as sink:  # noqa: PTH123, ASYNC230 - it is nothing
            await self._client.call(BUS_NAME, path, IMAGE, 'Export', 'hsa{sv}', sink.fileno(), 'core', {}, timeout=200)

    async def jobs(self) -> None:
        """Scenes of player.py: a few jobs that work and never end, and hundreds that wait for them; listed, ended."""
        paths = [await self.manager('Checkpoint', 'sa{sv}', f'cgroup:/slow/{number}', {}) for number in range(JOBS)]
        for _ in range(TIMES):
            assert len(await self.manager('ListJobs')) == JOBS
            assert len(await self.everything()) >= JOBS
            await self._client.properties(BUS_NAME, ROOT, MANAGER)
        for path in reversed(paths):
            await self._client.call(BUS_NAME, path, JOB, 'Cancel', 'a{sv}', {})
        assert await self.ended(paths[0]) == 'cancelled'
        for number in range(TIMES):
            assert await self.ended(await self.manager('Checkpoint', 'sa{sv}', f'cgroup:/many/{number}', {})) == 'done'


async def run(address: str, part: str, *arguments: str) -> None:
    async with await connect(address) as client, client.signals(BUS_NAME, ROOT) as signals:
        work: Callable[..., Awaitable[None]] = getattr(Busy(client, signals), part)
        await work(*arguments)


if __name__ == '__main__':
    asyncio.run(run(*sys.argv[1:]))

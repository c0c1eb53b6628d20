# SPDX-License-Identifier: LGPL-2.1-or-later
"""What random messages must not have changed about a daemon, once it has been tidied up."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptd.bus.client import connect
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from tests.daemon.test_api import Api
from tests.lib.bus import Served, family
from tests.programs.conftest import await_that

RSS = 64 << 10              # KiB more than after the first calls
EXECUTOR = min(32, (os.cpu_count() or 1) + 4)       # threads that asyncio.to_thread makes and keeps, at most
WORDS = ('Traceback', 'internal error', 'Warning', 'never retrieved')       # of no log


@dataclass
class Picture:
    """What a daemon and its spawner have open. threads: with those that to_thread keeps."""
    fds: Counter[str]
    threads: int
    children: list[int]
    rss: int

    @classmethod
    def take(cls, pid: int) -> 'Picture':
        children = family(pid)
        fds = Counter(kind_of(link) for one in (pid, *children) for link in links(one))
        names = [line.split()[1] for line in Path(f'/proc/{pid}/status').read_text().splitlines()
                 if line.startswith(('Threads:', 'VmRSS:'))]
        rss, threads = map(int, names)
        return cls(fds, threads, children, rss)


def links(pid: int) -> Iterator[str]:
    for path in Path(f'/proc/{pid}/fd').iterdir():
        with contextlib.suppress(FileNotFoundError):        # closed meanwhile
            yield str(path.readlink())


def kind_of(link: str) -> str:
    """'socket:[123]' is a 'socket:', 'anon_inode:[eventpoll]' itself."""
    return link if link.startswith(('/', 'anon_inode:')) else link.partition('[')[0]


def idle(pid: int) -> Picture:
    """Without a worker, which ends a moment after its last word."""
    return await_that('no worker', lambda: len(family(pid)) == 1 and Picture.take(pid), 20)


async def tidy(api: Api, victim: int) -> None:
    """As it was before anybody called: nothing frozen, no job at work. In passing, all kinds of calls work."""
    for target in await api.client.property_(BUS_NAME, ROOT, MANAGER, 'FrozenTargets'):
        await api('Thaw', 'sa{sv}', target, {})
    for _, path, _, _, state in await api('ListJobs'):
        if state not in ('done', 'failed', 'cancelled'):
            await api('Cancel', 'a{sv}', {}, path=path, interface='org.ckptd1.Job')
            await api.ended(path)
    [row] = await api('Scan', 'sa{sv}', f'pid:{victim}', {})
    assert row['tid'] == victim
    shown = await api.ended(await api('Checkpoint', 'sa{sv}', f'pid:{victim}', {}))
    assert shown['State'] == 'done'
    assert await api('VerifyImage', 's', shown['Image']) == []


async def tidied(served: Served, victim: int) -> None:
    async with await connect(served.address) as client, client.signals(BUS_NAME, ROOT) as signals:
        async with asyncio.timeout(5):
            await client.call(BUS_NAME, ROOT, 'org.freedesktop.DBus.Peer', 'Ping')
        await tidy(Api(client, signals), victim)


def check(served: Served, before: Picture, again: str) -> None:
    """Assert that the daemon is as it was, and that its log tells of no bug. again: how to repeat the run."""
    for words in WORDS:
        assert words not in served.log, f'{again}:\n{served.log}'
    # the pidfds of callers are closed when the bus has said that they are gone
    await_that(f'as few fds as {before.fds}, {again}', lambda: idle(served.pid).fds <= before.fds, 20)
    after = idle(served.pid)
    assert after.threads <= 1 + EXECUTOR, again
    assert after.rss - before.rss < RSS, again

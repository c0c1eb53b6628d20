# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random messages at every method of a daemon, for CKPTD_FUZZ_SECONDS (10), and nothing of them may stay.

Again with the seed of a failure: CKPTD_FUZZ_SEED=... pytest tests/daemon/test_fuzz.py
"""

import asyncio
import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptd.bus.client import connect
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from ckptd.kernel.status import read_status
from tests.daemon.test_api import Api
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT as CHECKOUT
from tests.lib.bus import Served, family
from tests.programs.conftest import await_that

SECONDS = float(os.environ.get('CKPTD_FUZZ_SECONDS') or 10)
NOBODY = 65534
RSS = 64 << 10              # KiB more than after the first calls
EXECUTOR = min(32, (os.cpu_count() or 1) + 4)       # threads that asyncio.to_thread makes and keeps, at most

pytestmark = [pytest.mark.needs('root', 'cgroup2', 'ptrace'), pytest.mark.timeout(120 + SECONDS)]


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


@pytest.fixture
def served(any_bus: str, tmp_path: Path, spool: Path) -> Iterator[Served]:
    for owner in (*[NOBODY] * 20, 1000):
        write_image(spool, owner)
    with Served(any_bus, tmp_path, spool, env={'PYTHONWARNINGS': 'default'}) as daemon:
        yield daemon


@pytest.fixture
def victim() -> Iterator[int]:
    """It is not waited for before the end: even dead it keeps its number."""
    with subprocess.Popen(['sleep', '1000'], user=NOBODY, group=NOBODY, extra_groups=[], cwd='/',
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield process.pid
        process.kill()


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


def fuzz(served: Served, seed: str, victim: int) -> dict[str, Any]:
    arguments = [served.address, seed, str(SECONDS), str(NOBODY), str(victim)]
    done = subprocess.run([sys.executable, '-m', 'tests.daemon.fuzzer', *arguments], cwd=CHECKOUT, capture_output=True,
                          text=True, timeout=SECONDS + 90, check=False)
    assert done.returncode == 0, f'the fuzzer itself failed, CKPTD_FUZZ_SEED={seed}:\n{done.stderr}'
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_random_messages(served: Served, victim: int) -> None:
    seed = os.environ.get('CKPTD_FUZZ_SEED') or secrets.token_hex(4)
    again = f'CKPTD_FUZZ_SEED={seed}'
    asyncio.run(tidied(served, victim))
    before = idle(served.pid)
    tally = fuzz(served, seed, victim)
    print(again, *(f'{what}: {tally[what]}' for what in ('sent', 'called', 'served', 'answers', 'vague')), sep='\n')
    assert tally['wrong'] == [], again
    asyncio.run(tidied(served, victim))
    for words in ('Traceback', 'internal error', 'inside ckptd', 'Warning', 'never retrieved'):
        assert words not in served.log, f'{again}:\n{served.log}'

    # the pidfds of callers are closed when the bus has said that they are gone
    await_that(f'as few fds as {before.fds}, {again}', lambda: idle(served.pid).fds <= before.fds, 20)
    after = idle(served.pid)
    assert after.threads <= 1 + EXECUTOR, again
    assert after.rss - before.rss < RSS, again
    status = read_status(victim)
    assert status.tracer_pid == 0
    assert served.stop() == 0, again

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many clients at once, and clients that behave badly while others want their answers. Counted, never timed."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.bus.client import Client, Signals, connect
from ckptd.bus.message import NO_REPLY_EXPECTED
from ckptd.bus.names import BUS_NAME, JOB, MANAGER, ROOT, token_path
from ckptd.bus.wire import make_call
from ckptd.kernel.status import read_status
from tests.bus.raw import Raw, message, to_object
from tests.daemon.test_api import sleeper
from tests.jobs.test_spool import write_image
from tests.lib.bus import Served
from tests.programs.conftest import await_that

__all__ = ['sleeper']

CLIENTS, VISITORS, CALLS = 100, 500, 200
SCANS = 40              # by real workers, which cost a third of a second each
IMAGES = 20
LISTINGS, MANY_IMAGES = 32, 300
MANAGED = 'org.freedesktop.DBus.ObjectManager'

pytestmark = [pytest.mark.needs('root'), pytest.mark.timeout(300)]


@pytest.fixture
def serve(any_bus: str, tmp_path: Path, spool: Path) -> Iterator[Callable[[str], Served]]:
    """serve('tests.jobs.scripted') starts a daemon whose workers play scenes."""
    for _ in range(IMAGES):
        write_image(spool)
    running: list[Served] = []

    def start(module: str = 'ckptd.daemon') -> Served:
        running.append(Served(any_bus, tmp_path, spool, module=module))
        return running[-1].start()

    yield start
    for one in running:
        assert one.stop() == 0, one.log
        assert 'Traceback' not in one.log
        assert 'internal error' not in one.log


async def manager(client: Client, member: str, signature: str = '', *args: Any) -> Any:
    return await client.call(BUS_NAME, ROOT, MANAGER, member, signature, *args, timeout=250)


async def together(address: str, visit: Callable[[Client, int], Any], count: int = CLIENTS) -> list[Any]:
    """What each of so many clients says of its visit; all are connected before the first one begins."""
    clients = [await connect(address) for _ in range(count)]
    try:
        return await asyncio.gather(*(visit(client, number) for number, client in enumerate(clients)))
    finally:
        for client in clients:
            await client.close()


async def job_of(client: Client, target: str) -> tuple[list[float], str]:
    """Its progress as it was told, and its state at the end."""
    path = token_path(client.connection.unique_name, 'mine')
    async with client.signals(BUS_NAME, path) as signals:
        assert await manager(client, 'Checkpoint', 'sa{sv}', target, {'handle_token': 'mine'}) == path
        told = await until_over(signals)
    return told, await client.property_(BUS_NAME, path, JOB, 'State')


async def until_over(signals: Signals) -> list[float]:
    progress = []
    async for signal in signals:
        if signal.interface == JOB:
            progress.append(signal.args[1])
        elif signal.args[1].get('State') in ('done', 'failed', 'cancelled'):
            break
    return progress


async def test_a_hundred_clients(serve: Callable[[str], Served]) -> None:
    """Each lists, looks at everything, has a job with progress, and looks at that."""
    daemon = serve('tests.jobs.scripted')

    async def visit(client: Client, number: int) -> tuple[list[float], str]:
        assert len(await manager(client, 'ListImages')) == IMAGES
        assert len(await manager(client, 'Scan', 'sa{sv}', f'cgroup:/rows/{number}', {})) == 3
        outcome = await job_of(client, f'cgroup:/many/{number}')
        listed = {path for _, path, _, _, _ in await manager(client, 'ListJobs')}
        assert token_path(client.connection.unique_name, 'mine') in listed
        assert len(await client.call(BUS_NAME, ROOT, MANAGED, 'GetManagedObjects')) > IMAGES
        return outcome

    outcomes = await together(daemon.address, visit)
    assert [state for _, state in outcomes] == ['done'] * CLIENTS
    for progress, _ in outcomes:
        assert progress == sorted(progress)
        assert progress[-1] == 1.0


@pytest.mark.needs('ptrace')
async def test_many_scans_of_one_process(serve: Callable[[str], Served], sleeper: str) -> None:
    daemon = serve('ckptd.daemon')

    async def visit(client: Client, number: int) -> str:
        [row] = await manager(client, 'Scan', 'sa{sv}', sleeper, {})
        return f'pid:{row["tid"]}'

    assert await together(daemon.address, visit, SCANS) == [sleeper] * SCANS


async def served_meanwhile(client: Client, nuisance: Callable[[], Any]) -> None:
    """Whatever else goes on, every call of this client is answered; it goes on at least as long as that."""
    trouble = asyncio.create_task(nuisance())
    answers = 0
    while answers < CALLS or not trouble.done():
        assert len(await manager(client, 'ListImages')) == IMAGES
        answers += 1
    await trouble


async def test_many_listings_at_once(serve: Callable[[str], Served], spool: Path) -> None:
    """Who asks for one thing is answered between them, and not after all."""
    for _ in range(MANY_IMAGES):
        write_image(spool)
    daemon = serve('ckptd.daemon')
    listing = make_call(BUS_NAME, ROOT, MANAGED, 'GetManagedObjects', flags=NO_REPLY_EXPECTED)
    async with await connect(daemon.address) as client, await connect(daemon.address) as crowd:
        await manager(crowd, 'ListJobs')
        for _ in range(LISTINGS - 1):
            crowd.connection.send(listing)
        # a short answer to a long question, so that it has its turn behind the others
        last = asyncio.create_task(crowd.call(BUS_NAME, '/org', 'org.freedesktop.DBus.Introspectable', 'Introspect',
                                              timeout=250))
        answers = 0
        while not last.done():
            await client.call(BUS_NAME, ROOT, 'org.freedesktop.DBus.Peer', 'Ping', timeout=250)
            answers += 1
        assert await last
    assert answers > LISTINGS / 4


async def test_clients_that_come_and_go(serve: Callable[[str], Served]) -> None:
    """Some of them with a call that nobody is there any more to hear the answer of."""
    daemon = serve('ckptd.daemon')

    async def nuisance() -> None:
        for number in range(VISITORS):
            visitor = await connect(daemon.address)
            if number % 2:
                member = ('ListImages', 'VerifyImage')[number % 4 // 2]
                signature, body = ('s', ['20260101_000000_x_0000']) if member == 'VerifyImage' else ('', [])
                visitor.connection.send(make_call(BUS_NAME, ROOT, MANAGER, member, signature, body))
            visitor.connection.abort()

    before = len(os.listdir(f'/proc/{daemon.pid}/fd'))      # noqa: PTH208 - a count
    async with await connect(daemon.address) as client:
        await served_meanwhile(client, nuisance)
    await asyncio.to_thread(await_that, 'the daemon forgets them',
                            lambda: len(os.listdir(f'/proc/{daemon.pid}/fd')) <= before, 20)   # noqa: PTH208
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_a_client_that_never_reads(serve: Callable[[str], Served]) -> None:
    """Its answers are kept by the bus, as long as the bus will; none of that is the daemon's."""
    daemon = serve('ckptd.daemon')
    call = to_object(BUS_NAME, ROOT, MANAGED, 'GetManagedObjects')
    async with await Raw.open(daemon.address) as deaf, await connect(daemon.address) as client:

        async def nuisance() -> None:
            try:
                async with asyncio.timeout(10):     # by then nobody takes what it says any more
                    for _ in range(3000):
                        await deaf.call(call)
            except (TimeoutError, ConnectionError):
                pass

        await served_meanwhile(client, nuisance)
    assert read_status(daemon.pid).vm_rss < 256 << 20


@pytest.mark.parametrize('cut', [1, 15, 16, 60, -1])
async def test_clients_that_die_in_the_middle_of_a_message(serve: Callable[[str], Served], cut: int) -> None:
    daemon = serve('ckptd.daemon')
    data = message(1, 2, to_object(BUS_NAME, ROOT, MANAGER, 'VerifyImage', 's'), b'\1\0\0\0a\0')

    async def nuisance() -> None:
        for _ in range(20):
            async with await Raw.open(daemon.address) as raw:
                await raw.send(data[:cut])

    async with await connect(daemon.address) as client:
        await served_meanwhile(client, nuisance)


def test_a_client_that_is_killed_while_its_job_waits(serve: Callable[[str], Served], tmp_path: Path) -> None:
    """A job goes on without the client; a call that somebody waits for does not."""
    daemon = serve('tests.jobs.scripted')
    with subprocess.Popen(['busctl', f'--address={daemon.address}', 'call', BUS_NAME, ROOT, MANAGER, 'Freeze', 'sa{sv}',
                           'cgroup:/slow', '0'], stdout=subprocess.DEVNULL) as process:
        await_that('the job works', lambda: 'running' in str(daemon.call('ListJobs')), 30)
        process.kill()
    await_that('it is cancelled', lambda: 'cancelled' in str(daemon.call('ListJobs')), 30)

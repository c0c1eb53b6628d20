# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service on a real bus: dbus-daemon, and dbus-broker where it is installed."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from ckptd.bus.client import Client, connect
from ckptd.bus.connection import Connection
from ckptd.bus.export import Exported
from ckptd.bus.router import Router
from tests.bus.broker import Broker
from tests.bus.sample import NAME, ROOT, Sample
from tests.lib.bus import PrivateBus


@pytest.fixture(autouse=True)
def no_thread_per_child() -> Iterator[None]:
    """Python 3.11 waits for each child in a thread, which ends a moment after it has told the loop."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith('asyncio-waitpid'):
            thread.join(5)


@pytest.fixture(params=[pytest.param('dbus-daemon', marks=pytest.mark.needs('dbus')),
                        pytest.param('dbus-broker', marks=pytest.mark.needs('dbus-broker'))])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a bus of either kind."""
    with (PrivateBus(tmp_path) if request.param == 'dbus-daemon' else Broker()) as bus:
        yield bus.address


@dataclass
class Service:
    """An exported Sample that owns NAME."""
    address: str
    connection: Connection
    router: Router
    sample: Sample
    tasks: set['asyncio.Task[None]'] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with await connect(self.address) as client:
            yield client


class Spawner:
    """What a job queue is for the router: the owner of the tasks."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    def __call__(self, coro: Coroutine[Any, Any, None], *, name: str | None = None) -> 'asyncio.Task[None]':
        task = asyncio.create_task(coro, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def serving(address: str, *others: tuple[str, Exported]) -> AsyncIterator[Service]:
    """A service on this bus while the context lasts."""
    connection, spawner = await Connection.open(address), Spawner()
    try:
        router, sample = Router(connection, spawner, ROOT), Sample()
        router.export(ROOT, sample)
        for path, exported in others:
            router.export(path, exported)
        await connection.request_name(NAME)
        yield Service(address, connection, router, sample, spawner.tasks)
    finally:
        await spawner.stop()
        await connection.close()
        await asyncio.get_running_loop().shutdown_default_executor()


@pytest_asyncio.fixture
async def service(address: str) -> AsyncIterator[Service]:
    async with serving(address) as running:
        yield running

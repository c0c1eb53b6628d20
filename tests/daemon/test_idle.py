# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon that the bus starts exits when idle, but never with a freeze, an inhibitor or a job."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from ckptd.bus.client import connect as bus_client
from ckptd.bus.connection import DRIVER, DRIVER_PATH, Connection, Match
from ckptd.bus.names import BUS_NAME, MANAGER
from ckptd.bus.names import ROOT as ROOT_PATH
from ckptd.bus.wire import make_signal
from ckptd.client import Ckptd, JobNew, connect
from ckptd.errors import CkptError, Unavailable
from tests.daemon.conftest import places
from tests.lib.bus import ROOT, PrivateBus, read_line, terminate

pytestmark = pytest.mark.needs('dbus')


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / 'ckptd.conf'
    path.write_text('[Manager]\nIdleExitSec=2s\nKeepJobsSec=100ms\n')
    return path


@pytest.fixture
def on_session_bus(private_bus: PrivateBus, tmp_path: Path, config: Path) -> Iterator['subprocess.Popen[bytes]']:
    with started(private_bus.address, tmp_path, config) as process:
        yield process


@pytest.fixture
async def ckptd(private_bus: PrivateBus, on_session_bus: 'subprocess.Popen[bytes]') -> AsyncIterator[Ckptd]:
    async with connect(private_bus.address) as client:
        yield client


async def ended(process: 'subprocess.Popen[bytes]', seconds: float = 20) -> int | None:
    """Its exit status; None if it goes on for so long."""
    pidfd, over = os.pidfd_open(process.pid), asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, over.set)
    try:
        await asyncio.wait_for(over.wait(), seconds)
    except TimeoutError:
        return None
    finally:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()


@contextmanager
def started(bus: str, tmp_path: Path, config: Path, program: tuple[str, ...] = ('-m', 'ckptd.daemon'),
            notify: str = '') -> Iterator['subprocess.Popen[bytes]']:
    """A daemon that takes the bus for the session's, ready. notify: the socket of its service manager."""
    with subprocess.Popen([sys.executable, *program, '--user', *places(tmp_path), '--config', str(config), '--verbose'],
                          stderr=subprocess.PIPE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
                          env={**os.environ, 'DBUS_SESSION_BUS_ADDRESS': bus, 'NOTIFY_SOCKET': notify}) as process:
        assert process.stderr is not None
        while 'ready' not in (line := read_line(process.stderr.fileno(), 20)):
            assert line
        yield process
        if process.poll() is None:
            terminate(process)


async def test_the_next_one_knows_who_listens(any_bus: str, tmp_path: Path, config: Path) -> None:
    """Also of those who have left meanwhile, and of another bus nobody."""
    heard: list[str] = []
    async with await Connection.open(any_bus) as listener, await bus_client(any_bus) as other:
        await listener.subscribe(Match(interface=MANAGER, member='JobNew'), lambda signal: heard.append(signal.member))
        with started(any_bus, tmp_path, config) as daemon:
            async with await bus_client(any_bus) as visitor:
                await visitor.call(BUS_NAME, ROOT_PATH, MANAGER, 'ListJobs')
            await listener.call(BUS_NAME, ROOT_PATH, MANAGER, 'ListJobs')
            assert await ended(daemon) == 0
        state = tmp_path / 'run/listeners'
        assert listener.unique_name in state.read_text()
        for bus, expected in (('', 1), ('of another bus', 1)):
            if bus:
                state.write_text(json.dumps({'bus': bus, 'senders': [listener.unique_name], 'viewers': []}))
            with started(any_bus, tmp_path, config) as daemon:
                assert not state.exists()
                with pytest.raises(CkptError):
                    await other.call(BUS_NAME, ROOT_PATH, MANAGER, 'Freeze', 'sa{sv}', 'cgroup:/no/such', {})
                await listener.call(DRIVER, DRIVER_PATH, DRIVER, 'GetId')       # after what was said to it before
                assert len(heard) == expected


async def test_events_go_on_with_the_next_one(any_bus: str, tmp_path: Path, config: Path) -> None:
    """Only what the owner of the name says counts; whoever waits for a job has none that goes on."""
    async with connect(any_bus) as listener, connect(any_bus) as caller, await Connection.open(any_bus) as liar, \
            asyncio.timeout(50):
        with started(any_bus, tmp_path, config) as daemon:
            hearing = AsyncExitStack()
            events = await hearing.enter_async_context(listener.events(JobNew))
            assert await ended(daemon) == 0
        lie = make_signal(ROOT_PATH, MANAGER, 'JobNew', 'uo', [7, '/lie'])
        lie.destination = listener._daemon.client.connection.unique_name
        liar.send(lie)
        with started(any_bus, tmp_path, config):
            with pytest.raises(CkptError):
                await (await caller.checkpoint('cgroup:/no/such')).wait()
            event = await anext(events)
            assert isinstance(event, JobNew)
            assert event.id == 1
        await hearing.aclose()


async def test_it_ends(on_session_bus: 'subprocess.Popen[bytes]', private_bus: PrivateBus) -> None:
    assert await ended(on_session_bus) == 0
    async with await bus_client(private_bus.address) as client:
        with pytest.raises(Unavailable):
            await client.owner(BUS_NAME)


async def test_systemd_hears_of_it_before_the_bus(private_bus: PrivateBus, tmp_path: Path, config: Path) -> None:
    """A bus that stands still gives no name up, and the service manager is told that it stops all the same."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name := f'\0ckptd-idle-{os.getpid()}')
        manager.setblocking(False)
        async with await Connection.open(private_bus.address) as watcher, asyncio.timeout(40):
            given_up = asyncio.Event()
            with started(private_bus.address, tmp_path, config, notify=name.replace('\0', '@')) as daemon:
                await watcher.subscribe(Match(DRIVER, DRIVER, 'NameOwnerChanged', DRIVER_PATH, arg0=BUS_NAME),
                                        lambda _: given_up.set())
                assert (await loop.sock_recv(manager, 1000)).startswith(b'READY=1')
                os.kill(private_bus.pid, signal.SIGSTOP)
                try:
                    assert await loop.sock_recv(manager, 1000) == b'STOPPING=1'
                finally:
                    os.kill(private_bus.pid, signal.SIGCONT)
                await given_up.wait()
                assert await ended(daemon) == 0


# gives its name up when it is told to
SLOW = """
import asyncio, sys
from ckptd import daemon
from ckptd.bus.connection import Connection
release = Connection.release_name
async def told(self, name):
    print(flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await release(self, name)
Connection.release_name = told
sys.exit(daemon.main())
"""


async def test_what_comes_before_it_has_left_is_answered(any_bus: str, tmp_path: Path, config: Path) -> None:
    """What would outlast its call is refused: systemd waits for the end of what says that it stops."""
    async with connect(any_bus) as ckptd:
        with started(any_bus, tmp_path, config, ('-c', SLOW)) as daemon:
            assert daemon.stdout is not None
            assert daemon.stdin is not None
            assert await asyncio.to_thread(read_line, daemon.stdout.fileno(), 20) == '\n'
            assert await ckptd.list_images() == []
            for call in (ckptd.freeze('self'), ckptd.checkpoint('self'), ckptd.inhibit('me', 'to try it')):
                with pytest.raises(Unavailable, match='stopping') as caught:
                    await call
                assert caught.value.hint == 'try again'
            daemon.stdin.write(b'now\n')
            daemon.stdin.flush()
            assert await ended(daemon) == 0
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_not_while_somebody_delays_checkpoints(ckptd: Ckptd, on_session_bus: 'subprocess.Popen[bytes]') -> None:
    with await ckptd.inhibit('me', 'to try it', f'pid:{os.getpid()}'):
        assert await ended(on_session_bus, 5) is None
    assert await ended(on_session_bus) == 0


@pytest.mark.needs('ptrace')
async def test_not_while_a_tree_is_frozen(ckptd: Ckptd, on_session_bus: 'subprocess.Popen[bytes]',
                                          sleeper: str) -> None:
    await ckptd.freeze(sleeper, freeze='ptrace')
    assert await ended(on_session_bus, 5) is None
    await ckptd.thaw(sleeper)
    assert await ended(on_session_bus) == 0


async def test_each_call_is_a_sign_of_life(ckptd: Ckptd, on_session_bus: 'subprocess.Popen[bytes]') -> None:
    for _ in range(12):
        await ckptd.list_images()
        assert await ended(on_session_bus, 0.2) is None
    assert await ended(on_session_bus) == 0

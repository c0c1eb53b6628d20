# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon that the bus starts ends when nobody wants anything; never with a freeze, an inhibitor or a job."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ckptd.bus.client import connect as bus_client
from ckptd.bus.names import BUS_NAME
from ckptd.client import Ckptd, connect
from ckptd.errors import Unavailable
from tests.daemon.conftest import places
from tests.lib.bus import ROOT, PrivateBus, read_line, terminate

pytestmark = pytest.mark.needs('dbus')


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / 'ckptd.conf'
    path.write_text('[Manager]\nIdleExitSec=500ms\nKeepJobsSec=100ms\n')
    return path


@pytest.fixture
def on_session_bus(private_bus: PrivateBus, tmp_path: Path, config: Path) -> Iterator['subprocess.Popen[bytes]']:
    """A daemon that takes the bus for the session's, ready."""
    with subprocess.Popen([sys.executable, '-m', 'ckptd.daemon', '--user', *places(tmp_path), '--config', str(config),
                           '--verbose'], stderr=subprocess.PIPE, cwd=ROOT,
                          env={**os.environ, 'DBUS_SESSION_BUS_ADDRESS': private_bus.address}) as process:
        assert process.stderr is not None
        while 'ready' not in (line := read_line(process.stderr.fileno(), 20)):
            assert line
        yield process
        if process.poll() is None:
            terminate(process)


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


async def test_it_ends(on_session_bus: 'subprocess.Popen[bytes]', private_bus: PrivateBus) -> None:
    assert await ended(on_session_bus) == 0
    async with await bus_client(private_bus.address) as client:
        with pytest.raises(Unavailable):
            await client.owner(BUS_NAME)


async def test_not_while_somebody_delays_checkpoints(ckptd: Ckptd, on_session_bus: 'subprocess.Popen[bytes]') -> None:
    with await ckptd.inhibit('me', 'to try it', f'pid:{os.getpid()}'):
        assert await ended(on_session_bus, 2.5) is None
    assert await ended(on_session_bus) == 0


@pytest.mark.needs('ptrace')
async def test_not_while_a_tree_is_frozen(ckptd: Ckptd, on_session_bus: 'subprocess.Popen[bytes]',
                                          sleeper: str) -> None:
    await ckptd.freeze(sleeper, freeze='ptrace')
    assert await ended(on_session_bus, 2.5) is None
    await ckptd.thaw(sleeper)
    assert await ended(on_session_bus) == 0


async def test_each_call_is_a_sign_of_life(ckptd: Ckptd, on_session_bus: 'subprocess.Popen[bytes]') -> None:
    for _ in range(12):
        await ckptd.list_images()
        assert await ended(on_session_bus, 0.2) is None
    assert await ended(on_session_bus) == 0

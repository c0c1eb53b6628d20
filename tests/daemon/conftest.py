# SPDX-License-Identifier: LGPL-2.1-or-later
"""Daemons as programs, and what the tests of them share."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ckptd.client import Ckptd, ImageAdded, connect
from tests.bus.broker import Broker
from tests.jobs.scripted import ScriptedDaemon
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT, Daemon, PrivateBus, read_line, terminate

COMMAND = [sys.executable, '-m', 'ckptd.daemon']


def places(tmp_path: Path) -> list[str]:
    return ['--spool', str(tmp_path / 'spool'), '--runtime', str(tmp_path / 'run')]


@pytest.fixture(params=[pytest.param('dbus-daemon', marks=pytest.mark.needs('dbus')),
                        pytest.param('dbus-broker', marks=pytest.mark.needs('dbus-broker'))])
def any_bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a bus of either kind, where everybody may do everything."""
    with (PrivateBus(tmp_path) if request.param == 'dbus-daemon' else Broker()) as bus:
        yield bus.address


@contextlib.contextmanager
def daemon_on(bus: PrivateBus, tmp_path: Path, module: str = 'ckptd.daemon') -> Iterator['subprocess.Popen[bytes]']:
    """A daemon on somebody else's bus, ready; its log is on stderr."""
    with subprocess.Popen([sys.executable, '-m', module, '--address', bus.address, *places(tmp_path), '--verbose'],
                          stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            while 'ready' not in (line := read_line(process.stderr.fileno(), 20)):
                assert line
            yield process
        finally:
            terminate(process)


@pytest.fixture
def on_bus(private_bus: PrivateBus, tmp_path: Path) -> Iterator['subprocess.Popen[bytes]']:
    """ckptd on the bus of this test."""
    with daemon_on(private_bus, tmp_path) as process:
        yield process


def start_sleeper() -> 'subprocess.Popen[bytes]':
    return subprocess.Popen(['sleep', '1000'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            start_new_session=True)


@pytest.fixture
def sleeper() -> Iterator[str]:
    """A target that does nothing."""
    with start_sleeper() as process:
        yield f'pid:{process.pid}'
        process.kill()


@pytest.fixture
def scripted(tmp_path: Path, spool: Path) -> Iterator[ScriptedDaemon]:
    """A daemon whose workers play scenes."""
    with ScriptedDaemon(tmp_path, spool) as running:
        yield running


@pytest.fixture
async def ckptd(daemon: Daemon) -> AsyncIterator[Ckptd]:
    """A client of the daemon of this test."""
    async with connect(daemon.address) as made, asyncio.timeout(50):
        yield made


@pytest.fixture
async def player(scripted: ScriptedDaemon) -> AsyncIterator[Ckptd]:
    """A client of the one that plays."""
    async with connect(scripted.address) as made, asyncio.timeout(50):
        yield made


async def image_of(ckptd: Ckptd, spool: Path, scene: str) -> str:
    """An image whose restore plays the scene, known to the daemon."""
    async with ckptd.events(ImageAdded) as added:
        image = write_image(spool, os.getuid(), target=f'cgroup:/{scene}')
        async for event in added:
            if isinstance(event, ImageAdded) and event.image == image:
                break
    return image

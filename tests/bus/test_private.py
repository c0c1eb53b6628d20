# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bus of our own: reachable by us only, and gone with us."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.bus.client import connect
from ckptd.bus.private import PREFIX, private_bus, remove_stale
from ckptd.errors import NotSupported, Unavailable
from tests.bus.test_peers import open_to_all

pytestmark = pytest.mark.needs('dbus')
CODE = '''
import asyncio, sys
from ckptd.bus.private import private_bus
async def main():
    async with private_bus() as bus:
        print(bus.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
'''


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A $TMPDIR short enough for a socket, watched for what is left in it."""
    with tempfile.TemporaryDirectory(prefix='ckptd-test-', dir='/tmp') as name:
        monkeypatch.setenv('TMPDIR', name)
        monkeypatch.setattr(tempfile, 'tempdir', None)
        yield Path(name)


def modes_in(directory: Path) -> list[int]:
    return [path.stat().st_mode & 0o777 for path in directory.iterdir()]


def comm(pid: int) -> str:
    return Path(f'/proc/{pid}/comm').read_text().strip()


async def test_it_works_and_is_gone_afterwards(temporary: Path) -> None:
    async with private_bus() as bus:
        [mode] = modes_in(temporary)
        assert mode == 0o700
        async with await connect(bus.address) as client:
            assert await client.owner('org.freedesktop.DBus') == 'org.freedesktop.DBus'
        assert comm(bus.pid) == 'dbus-daemon'
    assert not modes_in(temporary)
    with pytest.raises(ProcessLookupError):
        os.kill(bus.pid, 0)


async def test_it_ends_with_an_error_too(temporary: Path) -> None:
    with pytest.raises(RuntimeError):
        async with private_bus() as bus:
            raise RuntimeError
    assert not modes_in(temporary)
    with pytest.raises(Unavailable):
        await connect(bus.address)


@pytest.mark.needs('root')
async def test_another_user_is_not_let_in() -> None:
    code = f'import os, asyncio, sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n' \
           'from ckptd.bus.connection import Connection\nos.setuid(1)\n' \
           'asyncio.run(Connection.open(sys.argv[1], timeout=5))'
    async with private_bus() as bus:
        open_to_all(bus.address)        # even if the directory were open
        process = await asyncio.create_subprocess_exec(sys.executable, '-c', code, bus.address,
                                                       stderr=asyncio.subprocess.PIPE)
        _, said = await process.communicate()
    assert b'Unavailable' in said


def test_it_dies_with_its_owner(temporary: Path) -> None:
    owner = subprocess.Popen([sys.executable, '-c', CODE], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert owner.stdout is not None
    bus = os.pidfd_open(int(owner.stdout.readline()))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert select.select([bus], [], [], 5)[0]
    os.close(bus)
    # what could not be tidied up by the killed is tidied up by the next
    assert [path.name.startswith(PREFIX) for path in remove_stale(temporary)] == [True]
    assert not modes_in(temporary)


async def test_a_bus_in_use_is_not_stale(temporary: Path) -> None:
    async with private_bus() as bus:
        assert remove_stale(temporary) == []
        (await connect(bus.address)).connection.abort()


async def test_no_dbus_daemon_here(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setenv('PATH', str(temporary))
    with pytest.raises(NotSupported) as caught:
        async with private_bus():
            pass
    assert 'apt-get install' in caught.value.hint
    assert not modes_in(temporary)


async def test_what_a_failing_dbus_daemon_says_is_shown(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr('ckptd.bus.private.CONFIG', 'nonsense')
    with pytest.raises(Unavailable, match=r'did not start: .*bus\.conf'):
        async with private_bus():
            pass
    assert not modes_in(temporary)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

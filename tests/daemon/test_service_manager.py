# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who speaks to the service manager: the daemon that it has started, and no other process of ours."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.conftest import COMMAND, places
from tests.lib.bus import ROOT, PrivateBus, Served, family, read_line, terminate

pytestmark = pytest.mark.needs('dbus')

NAMES = ('NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID', 'LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES', 'FDSTORE')


class Manager:
    """The notification socket of a unit, and what systemd gives the unit's processes."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = directory / 'notify'
        self._socket.bind(str(self._path))
        self._socket.settimeout(20)

    def environment(self, **more: str) -> dict[str, str]:
        # the process that systemd has started is not known before it is there: WATCHDOG_PID names nobody, so that all
        # may think that they are meant
        return {**os.environ, 'NOTIFY_SOCKET': str(self._path), 'WATCHDOG_USEC': '100000', 'WATCHDOG_PID': '',
                'LISTEN_PID': '1', 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': 'x', 'FDSTORE': '9', **more}

    def hear(self) -> bytes:
        return self._socket.recv(1000)

    def heard(self) -> list[bytes]:
        """What was said since."""
        said = []
        while select.select([self._socket], [], [], 0)[0]:
            said.append(self._socket.recv(1000))
        return said

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


def told_of_the_unit(pids: list[int]) -> list[tuple[str, str]]:
    """(program, variable) for each of these that has what is for the unit's own process alone."""
    assert pids
    found = []
    for pid in pids:
        names = {entry.partition(b'=')[0].decode() for entry in Path(f'/proc/{pid}/environ').read_bytes().split(b'\0')}
        found += [(Path(f'/proc/{pid}/comm').read_text().strip(), name) for name in NAMES if name in names]
    return found


def test_a_private_daemon_in_a_unit(manager: Manager, tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, '--private', *places(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT,
                               env=manager.environment())
    assert process.stdout is not None
    try:
        assert read_line(process.stdout.fileno(), 20).startswith('DBUS_ADDRESS=')
        started = family(process.pid)
        assert 'dbus-daemon' in {Path(f'/proc/{pid}/comm').read_text().strip() for pid in started}
        assert told_of_the_unit(started) == []
    finally:
        assert terminate(process) == 0
        process.stdout.close()
    assert manager.heard() == []


def test_a_standalone_command_in_a_unit(manager: Manager, tmp_path: Path) -> None:
    """The program of the user's that it runs is no part of it, and has what the unit has."""
    with subprocess.Popen(
            [sys.executable, '-m', 'ckptd.cli', 'inhibit', '--standalone', '--spool', str(tmp_path / 'spool'), 'self',
             'sh', '-c', 'echo "$NOTIFY_SOCKET"; read end'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=manager.environment(), cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert read_line(process.stdout.fileno(), 30).strip() == manager.environment()['NOTIFY_SOCKET']
        ours = [pid for pid in family(process.pid) if Path(f'/proc/{pid}/comm').read_text() != 'sh\n']
        assert len(ours) >= 3       # the daemon, its bus, the spawner
        assert told_of_the_unit(ours) == []
        process.stdin.write(b'\n')
        process.stdin.flush()
        assert process.wait(30) == 0
    assert manager.heard() == []


def test_the_unit_of_the_daemon_itself(manager: Manager, private_bus: PrivateBus, tmp_path: Path) -> None:
    """It says what it is for, as the process that systemd has started; and what it has started says nothing."""
    script = 'export SYSTEMD_EXEC_PID=$$ WATCHDOG_PID=$$; exec "$@"'
    process = subprocess.Popen(['sh', '-c', script, 'sh', *COMMAND, '--address', private_bus.address,
                                *places(tmp_path)], cwd=ROOT, env=manager.environment())
    try:
        assert manager.hear().startswith(b'READY=1\n')
        assert manager.hear() == b'WATCHDOG=1'
        assert told_of_the_unit(family(process.pid)) == []
    finally:
        assert terminate(process) == 0
    assert b'STOPPING=1' in manager.heard()


def test_a_daemon_that_another_process_of_a_unit_has_started(manager: Manager, private_bus: PrivateBus, tmp_path: Path,
                                                             spool: Path) -> None:
    """A program that is a service starts a daemon on a bus of its own choice, say for tests: systemd.exec(5) tells the
    two apart."""
    process = subprocess.Popen([*COMMAND, '--address', private_bus.address, *places(tmp_path), '--verbose'],
                               stderr=subprocess.PIPE, cwd=ROOT, env=manager.environment(SYSTEMD_EXEC_PID='1'))
    assert process.stderr is not None
    try:
        while 'ready' not in (line := read_line(process.stderr.fileno(), 20)):
            assert line
    finally:
        assert terminate(process) == 0
        process.stderr.close()
    assert manager.heard() == []


def test_workers(private_bus: PrivateBus, tmp_path: Path, spool: Path) -> None:
    """One that holds a freeze has nothing of the daemon's unit."""
    with Served(private_bus.address, tmp_path, spool, env={'WATCHDOG_USEC': '20000000', 'FDSTORE': '9'}) as daemon, \
            subprocess.Popen(['sleep', '1000']) as sleeper:
        before = family(daemon.pid)
        daemon.call('Freeze', 'sa{sv}', f'pid:{sleeper.pid}', '2', 'freeze', 's', 'ptrace', 'detach', 'b', 'true')
        assert len(family(daemon.pid)) > len(before)
        assert told_of_the_unit(family(daemon.pid)) == []
        daemon.call('Thaw', 'sa{sv}', f'pid:{sleeper.pid}', '0')
        sleeper.kill()

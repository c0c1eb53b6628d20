# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon as a program: how it starts, what it says when it cannot, and how it ends."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd import __version__
from ckptd.bus.names import BUS_NAME
from tests.daemon.conftest import COMMAND, places
from tests.lib.bus import ROOT, Daemon, PrivateBus, Served, family, read_line, terminate
from tests.programs.conftest import await_that


def run(*arguments: str, **environment: str) -> 'subprocess.CompletedProcess[str]':
    """A daemon that is expected to end by itself."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=30, cwd=ROOT, check=False,
                          env={**os.environ, **environment})


def test_version() -> None:
    assert run('--version').stdout == f'ckptd {__version__}\n'


def test_help_has_an_example() -> None:
    assert 'ckptd --private --spool' in run('--help').stdout


@pytest.mark.parametrize(('arguments', 'status', 'words'), [
    (['--address', 'unix:path=/nonexistent/bus'], 69, '/nonexistent/bus'),
    (['--address', 'nonsense'], 69, 'nonsense'),
    (['--private', '--system'], 2, 'not allowed with'),
])
def test_no_bus(arguments: list[str], status: int, words: str, tmp_path: Path) -> None:
    done = run(*arguments, *places(tmp_path))
    assert (done.returncode, done.stdout) == (status, '')
    assert words in done.stderr
    assert 'Traceback' not in done.stderr


def test_no_dbus_daemon_on_the_machine(tmp_path: Path) -> None:
    done = run('--private', *places(tmp_path), PATH='/nonexistent')
    assert done.returncode == 1
    assert 'dbus-daemon is not installed' in done.stderr
    assert 'apt-get install' in done.stderr


def test_a_spool_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    done = run('--private', '--spool', str(tmp_path / 'file/spool'), '--runtime', str(tmp_path / 'run'))
    assert done.returncode == 1
    assert done.stderr == (f'ckptd: spool {tmp_path}/file/spool: Not a directory '
                           '(choose another spool with --spool DIR, or run as its owner)\n')


def test_the_name_is_taken(on_bus: 'subprocess.Popen[bytes]', private_bus: PrivateBus, tmp_path: Path) -> None:
    done = run('--address', private_bus.address, *places(tmp_path))
    assert done.returncode == 75
    assert 'another process owns the name org.ckptd1' in done.stderr


def test_it_ends_with_its_bus(on_bus: 'subprocess.Popen[bytes]', private_bus: PrivateBus) -> None:
    os.kill(private_bus.pid, signal.SIGTERM)
    assert on_bus.wait(20) == 69
    assert on_bus.stderr is not None
    assert 'the bus is gone' in on_bus.stderr.read().decode()


def test_service_manager_is_told(private_bus: PrivateBus, tmp_path: Path) -> None:
    """READY=1 once the name is owned, WATCHDOG=1 all the time, STOPPING=1 at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / 'notify'))
        manager.settimeout(20)
        process = subprocess.Popen(
            [*COMMAND, '--address', private_bus.address, *places(tmp_path)], cwd=ROOT,
            env={**os.environ, 'NOTIFY_SOCKET': str(tmp_path / 'notify'), 'WATCHDOG_USEC': '600000'})
        try:
            assert manager.recv(1000).startswith(b'READY=1\nSTATUS=')
            assert [manager.recv(1000) for _ in range(2)] == [b'WATCHDOG=1'] * 2
        finally:
            assert terminate(process) == 0
        rest = []
        while select.select([manager], [], [], 0)[0]:
            rest.append(manager.recv(1000))
        assert b'STOPPING=1' in rest     # and fed while it stops


def test_it_does_not_outlive_who_started_it_for_itself(tmp_path: Path) -> None:
    """A client that is killed leaves no daemon, bus or worker behind (the settled check sees to the last two)."""
    script = ('import subprocess, sys\n'
              'process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, start_new_session=True)\n'
              'print(process.pid, flush=True)\n'
              'process.stdout.readline()\n'
              'print("ready", flush=True)\n'
              'sys.stdin.read()\n')
    client = subprocess.Popen([sys.executable, '-c', script, *COMMAND, '--private', *places(tmp_path)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert client.stdout is not None
    assert client.stdin is not None
    daemon = os.pidfd_open(int(read_line(client.stdout.fileno(), 20)))
    try:
        assert read_line(client.stdout.fileno(), 20) == 'ready\n'
        client.kill()
        client.wait()
        assert select.select([daemon], [], [], 20)[0], 'the daemon runs on'
    finally:
        os.close(daemon)
        client.stdout.close()
        client.stdin.close()


def test_debugging_by_module(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(env={'CKPTD_DEBUG': 'ckptd.bus,ckptd.daemon'})
    assert daemon.call('ListJobs') == [[]]


@pytest.mark.needs('cgroup2')
def test_sigterm_thaws_what_is_held(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    sleeper = subprocess.Popen(['sleep', '1000'])
    try:
        assert daemon.call('Freeze', 'sa{sv}', f'pid:{sleeper.pid}', '0') == [1]
        assert daemon.stop() == 0
        assert not frozen(sleeper.pid)
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.needs('cgroup2', 'ptrace')
@pytest.mark.parametrize('mode', ['auto', 'ptrace'])
def test_a_freeze_ends_with_its_process(start_daemon: Callable[..., Daemon], mode: str) -> None:
    """Killed while it stands still; a child of it runs on."""
    daemon = start_daemon()
    with subprocess.Popen(['sh', '-c', 'sleep 1000 & wait'], start_new_session=True) as shell:
        await_that('a child', lambda: family(shell.pid))
        [child] = family(shell.pid)
        assert daemon.call('Freeze', 'sa{sv}', f'pid:{shell.pid}', '1', 'freeze', 's', mode) == [2]
        shell.kill()
        await_that('nothing is held', lambda: property_of(daemon, 'FrozenTargets') == [])
        assert not frozen(child)
        assert 'TracerPid:\t0' in Path(f'/proc/{child}/status').read_text()
        os.kill(child, signal.SIGKILL)
    assert daemon.stop() == 0
    assert 'Traceback' not in daemon.log


@pytest.mark.needs('cgroup2', 'dbus')
def test_its_bus_is_not_frozen(private_bus: PrivateBus, tmp_path: Path) -> None:
    """There would be no way to say Thaw."""
    with Served(private_bus.address, tmp_path, tmp_path / 'spool') as daemon:
        done = daemon.busctl('call', BUS_NAME, '/org/ckptd1', 'org.ckptd1.Manager', 'Freeze', 'sa{sv}',
                             f'pid:{private_bus.pid}', '0')
        assert done.returncode != 0
        assert property_of(daemon, 'FrozenTargets') == []


def property_of(daemon: Daemon, name: str) -> object:
    done = daemon.busctl('--json=short', 'get-property', BUS_NAME, '/org/ckptd1', 'org.ckptd1.Manager', name)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)['data']


@pytest.mark.needs('cgroup2')
def test_kill_9_of_the_daemon_thaws_what_is_held(start_daemon: Callable[..., Daemon]) -> None:
    """The worker learns of it by end-of-file, lets go and ends."""
    daemon = start_daemon()
    sleeper = subprocess.Popen(['sleep', '1000'])
    try:
        assert daemon.call('Freeze', 'sa{sv}', f'pid:{sleeper.pid}', '0') == [1]
        workers = [os.pidfd_open(pid) for pid in family(daemon.pid)]
        daemon.process.kill()
        for pidfd in workers:
            assert select.select([pidfd], [], [], 20)[0]
            os.close(pidfd)
        assert not frozen(sleeper.pid)
    finally:
        sleeper.kill()
        sleeper.wait()


def frozen(pid: int) -> bool:
    """Whether the cgroup v2 of a process is frozen."""
    [name] = [line[3:].strip() for line in Path(f'/proc/{pid}/cgroup').read_text().splitlines() if line[:3] == '0::']
    [mount] = [line.split()[4] for line in Path('/proc/self/mountinfo').read_text().splitlines()
               if ' - cgroup2 ' in line][:1]
    return 'frozen 1' in Path(f'{mount}{name}/cgroup.events').read_text()


def test_signals_before_it_is_ready(tmp_path: Path) -> None:
    process = subprocess.Popen([*COMMAND, '--private', *places(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    with process.stdout:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)

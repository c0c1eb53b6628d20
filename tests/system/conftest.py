# SPDX-License-Identifier: LGPL-2.1-or-later
"""One installation and one booted machine for all tests of this directory."""

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lib.gate import verdict
from tests.system.container import ROOT, Container

# a service whose memory goes on: what it counted is seen in its file, and a lost count would be too
COUNTER = """#!/usr/bin/python3 -I
import os, sys, time
path = sys.argv[1]
count = 0
while True:
    count += 1
    with open(path + '.new', 'w') as file:
        file.write(f'{os.getpid()} {count}')
    os.rename(path + '.new', path)
    time.sleep(0.01)
"""
# a file, so that the unit has no socket
UNIT = """[Unit]
Description=Counts
[Service]
ExecStart=/usr/local/bin/count /run/%N
StandardOutput=append:/run/%N.log
"""
FILTERS = """SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
RestrictRealtime=yes
LockPersonality=yes
"""
# of a unit that a distribution brings: what makes namespaces, which would end with the unit
WITHOUT_NAMESPACES = '[Service]\n' + ''.join(f'{name}=no\n' for name in (
    'PrivateDevices', 'PrivateTmp', 'PrivateUsers', 'ProtectControlGroups', 'ProtectHome', 'ProtectHostname',
    'ProtectKernelLogs', 'ProtectKernelModules', 'ProtectKernelTunables', 'ProtectSystem')) + ''.join(
    f'{name}=\n' for name in ('ExecPaths', 'NoExecPaths', 'ReadWritePaths')) + 'ProtectProc=default\n'
USER, UID = 'alice', 4242
HOOK = ROOT / 'units/checkpoint-before-stop.conf'
FILES = {
    '/usr/local/bin/count': COUNTER,
    '/etc/systemd/system/counter.service': UNIT,
    '/etc/systemd/system/filtered.service': UNIT + FILTERS,
    '/etc/systemd/system/redis-server.service.d/without-namespaces.conf': WITHOUT_NAMESPACES,
    '/etc/systemd/system/private.service': UNIT + 'PrivateTmp=yes\n',
    '/etc/systemd/system/hooked.service': UNIT,
    '/etc/systemd/system/hooked.service.d/checkpoint-before-stop.conf': HOOK.read_text(),
    '/etc/systemd/system/of-nobody.service': UNIT.replace('/run/%N', '/tmp/%N') + 'User=nobody\n',
}


@pytest.fixture(scope='session')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install DESTDIR=` makes, for PREFIX=/usr as a distribution would; once for all pytest workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    stage, done = shared / 'stage', shared / 'stage.done'
    with (shared / 'stage.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            made = subprocess.run(['make', '--no-print-directory', 'install', f'DESTDIR={stage}', 'PREFIX=/usr'],
                                  cwd=ROOT, capture_output=True, text=True, check=False)
            assert made.returncode == 0, made.stdout + made.stderr
            done.touch()
    return stage


@pytest.fixture(scope='session')
def machine(test_cgroup: Path | None, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    reason, failure = verdict(['systemd', 'unshare', 'busctl'])
    if reason:
        (pytest.fail if failure else pytest.skip)(reason)
    assert test_cgroup is not None
    # beside the cgroup of the tests: what systemd makes and removes there is no test's leaving
    with Container(test_cgroup.parent, tmp_path_factory.mktemp('machine'), stage=installed, files=FILES) as booted:
        booted.run('chmod', '755', '/usr/local/bin/count')
        yield booted


@pytest.fixture
def service(machine: Container) -> Iterator[Callable[[str], str]]:
    """Start a unit for the time of the test; returns its name."""
    started: list[str] = []

    def start(unit: str) -> str:
        started.append(unit)
        machine.run('systemctl', 'start', unit)
        return unit

    yield start
    for unit in started:
        machine.run('systemctl', 'kill', '--signal=KILL', unit, check=False)
        machine.run('systemctl', 'stop', unit, check=False)
        machine.run('systemctl', 'reset-failed', unit, check=False)


@pytest.fixture(scope='module')
def session(machine: Container) -> Iterator[Container]:
    """The machine with a user whose manager and bus run."""
    machine.run('useradd', '--create-home', '--uid', str(UID), USER)
    machine.run('systemctl', 'start', f'user@{UID}.service')
    yield machine
    machine.run('systemctl', 'stop', f'user@{UID}.service')
    machine.run('userdel', '--remove', USER)


def as_user(machine: Container, *command: str, check: bool = True) -> 'subprocess.CompletedProcess[str]':
    runtime = f'/run/user/{UID}'
    return machine.run('env', f'XDG_RUNTIME_DIR={runtime}', f'DBUS_SESSION_BUS_ADDRESS=unix:path={runtime}/bus',
                       *command, user=USER, check=check)

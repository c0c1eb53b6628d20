# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unit with WatchdogSec=, which systemd ends if it is frozen for too long: it is fed, or not frozen."""

from collections.abc import Callable, Iterator

import pytest

from tests.system.conftest import as_user
from tests.system.container import Container
from tests.system.test_service import await_that, ctl

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl')

PROGRAM = """
import os, socket, time

def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text, os.environ['NOTIFY_SOCKET'])

notify(b'READY=1')
while True:
    notify(b'WATCHDOG=1')
    time.sleep(0.1)
"""
UNIT, SECONDS = 'watched.service', 2


@pytest.fixture
def start(machine: Container) -> Iterator[Callable[..., None]]:
    manager: list[str] = []

    def start(*properties: str, user: bool = False) -> None:
        manager[:] = ['--user'] if user else []
        command = ('systemd-run', *manager, f'--unit={UNIT}', '-pType=notify', f'-pWatchdogSec={SECONDS}',
                   '-pStandardOutput=null', '-pStandardError=null', *properties, '--', '/usr/bin/python3', '-I', '-c',
                   PROGRAM)
        if user:
            as_user(machine, *command)
        else:
            machine.run(*command)

    yield start
    for command in (('stop', UNIT), ('reset-failed', UNIT)):
        if manager:
            as_user(machine, 'systemctl', *manager, *command, check=False)
        else:
            machine.run('systemctl', *command, check=False)


def fed_at(machine: Container) -> int:
    """Time of the last WATCHDOG=1, in microseconds."""
    return int(machine.property(UNIT, 'WatchdogTimestampMonotonic'))


@pytest.mark.parametrize(('user', 'mode'), [('root', 'unit'), ('nobody', 'ptrace')])
def test_it_is_fed_while_it_is_frozen(machine: Container, start: Callable[..., None], user: str, mode: str) -> None:
    start(f'--uid={user}')
    main = machine.property(UNIT, 'MainPID')
    machine.run('ckptctl', 'freeze', UNIT, '--freeze', mode, user=user)
    began = fed_at(machine)
    await_that('its time has passed', lambda: fed_at(machine) > began + SECONDS * 1_200_000
               or machine.property(UNIT, 'ActiveState') != 'active')
    assert (machine.property(UNIT, 'SubState'), machine.property(UNIT, 'MainPID')) == ('running', main)
    machine.run('ckptctl', 'thaw', UNIT, user=user)
    thawed = fed_at(machine)
    await_that('it feeds itself', lambda: fed_at(machine) > thawed)
    assert machine.property(UNIT, 'MainPID') == main


def test_it_is_checkpointed(machine: Container, start: Callable[..., None]) -> None:
    start()
    ctl(machine, 'remove', ctl(machine, 'checkpoint', UNIT)['image'])
    image = ctl(machine, 'checkpoint', UNIT, '--kill')['image']
    assert (machine.property(UNIT, 'ActiveState'), machine.property(UNIT, 'Result')) == ('inactive', 'success')
    ctl(machine, 'remove', image)


@pytest.mark.needs('user-session')
def test_a_users_daemon_refuses_to_keep_it_frozen(session: Container, start: Callable[..., None]) -> None:
    """It has no right to feed it. A checkpoint takes less time than the watchdog."""
    start(user=True)
    refused = as_user(session, 'ckptctl', '--user', 'freeze', UNIT, check=False)
    assert refused.returncode == 1, refused.stderr
    assert f'the watchdog of {UNIT} (WatchdogSec={SECONDS}s) would end it while it is frozen' in refused.stderr
    image = as_user(session, 'ckptctl', '--user', 'checkpoint', '-q', UNIT).stdout.strip()
    as_user(session, 'ckptctl', '--user', 'remove', image)

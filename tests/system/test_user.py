# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd on the session bus of a user: activated, in the user's own cgroup, with the user's own images."""

import json
import time

import pytest

from tests.system.conftest import UID, USER, as_user
from tests.system.container import Container

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl', 'user-session')


def test_a_call_activates_the_users_daemon(session: Container) -> None:
    spool = as_user(session, 'busctl', '--user', 'get-property', 'org.ckptd1', '/org/ckptd1', 'org.ckptd1.Manager',
                    'Spool')
    assert spool.stdout == f's "/home/{USER}/.local/state/ckptd"\n'
    shown = as_user(session, 'systemctl', '--user', 'show', '--property=ActiveState,ControlGroup', 'ckptd.service')
    assert 'ActiveState=active' in shown.stdout
    assert f'/user.slice/user-{UID}.slice/user@{UID}.service/session.slice/ckptd.service' in shown.stdout


@pytest.mark.parametrize('mode', ['auto', 'unit', 'ptrace'])
def test_a_user_checkpoints_an_own_unit(session: Container, mode: str) -> None:
    unit = f'counter-{mode}.service'
    as_user(session, 'systemd-run', '--user', f'--unit={unit}', f'-pStandardOutput=append:/tmp/{mode}.log', '--',
            '/usr/local/bin/count', f'/tmp/{mode}')
    before = await_count(session, mode, 0)
    done = as_user(session, 'ckptctl', '--user', '--json', 'checkpoint', unit, '--freeze', mode)
    image = json.loads(done.stdout)['image']
    await_count(session, mode, before)
    assert session.run('stat', '--format=%U %a', f'/home/{USER}/.local/state/ckptd').stdout == f'{USER} 700\n'
    assert as_user(session, 'ckptctl', '--user', 'verify', image).returncode == 0
    as_user(session, 'ckptctl', '--user', 'remove', image)
    as_user(session, 'systemctl', '--user', 'stop', unit)


def test_what_a_user_makes_is_no_unit_of_the_system(session: Container) -> None:
    """He has a cgroup of his own, and calls what is in it as units of the system are called."""
    of_user = f'/sys/fs/cgroup/user.slice/user-{UID}.slice/user@{UID}.service'
    for unit in ('counter.service', 'of-nobody.service'):
        as_user(session, 'systemd-run', '--user', f'--unit=fake-{unit}', 'sleep', '1000')
        main = as_user(session, 'systemctl', '--user', 'show', '--value', '--property=MainPID', f'fake-{unit}').stdout
        as_user(session, 'sh', '-c', f'mkdir {of_user}/{unit} && echo {main.strip()} > {of_user}/{unit}/cgroup.procs')
    session.run('systemctl', 'start', 'counter.service')
    session.run('ckptctl', 'freeze', 'counter.service', '--freeze', 'unit')
    assert session.property('counter.service', 'FreezerState') == 'frozen'
    session.run('ckptctl', 'thaw', 'counter.service')
    missing = session.run('ckptctl', 'freeze', 'of-nobody.service', check=False)
    assert missing.returncode == 5, missing.stderr
    session.run('systemctl', 'stop', 'counter.service')
    as_user(session, 'systemctl', '--user', 'stop', 'fake-*.service')


def await_count(machine: Container, name: str, above: int) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        text = machine.run('cat', f'/tmp/{name}', check=False).stdout
        if text and int(text.split()[1]) > above:
            return int(text.split()[1])
    raise AssertionError(f'{name} does not count')

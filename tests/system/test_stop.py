# SPDX-License-Identifier: LGPL-2.1-or-later
"""`checkpoint --kill UNIT`: the unit's manager stops it. It has not failed, and no second one is started."""

from collections.abc import Callable, Iterator

import pytest

from tests.system.conftest import as_user
from tests.system.container import Container
from tests.system.test_service import await_that, ctl

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl')

# What its handler of SIGTERM does is not in the image, so it must not run.
PROGRAM = """
import os, signal, sys, time
directory, main = sys.argv[1], os.getpid()

def on_term(number, frame):
    open(f'{directory}/handled', 'w').close()
    os._exit(0)

signal.signal(signal.SIGTERM, on_term)
os.fork()
with open(f'{directory}/{"main" if os.getpid() == main else "child"}', 'w') as file:
    file.write(str(os.getpid()))
while True:
    time.sleep(0.01)
"""
RULE = """polkit.addRule(function (action, subject) {
    if (action.id == "org.freedesktop.systemd1.manage-units" && action.lookup("unit") == "stopped.service" &&
        action.lookup("verb") == "stop" && subject.user == "nobody")
        return polkit.Result.YES;
});
"""
RULES = '/etc/polkit-1/rules.d/40-stopped.rules'
UNIT, PLACE = 'stopped.service', '/tmp/stopped'
ENDED = {'ActiveState': 'inactive', 'Result': 'success', 'NRestarts': '0'}


def state(machine: Container, *manager: str) -> dict[str, str]:
    show = ('systemctl', *manager, 'show', f'--property={",".join(ENDED)}', UNIT)
    done = as_user(machine, *show) if manager else machine.run(*show)
    return dict(line.split('=', 1) for line in done.stdout.splitlines())


@pytest.fixture(autouse=True, scope='module')
def no_image_left(machine: Container) -> Iterator[None]:
    yield
    for image in ctl(machine, 'list'):
        ctl(machine, 'remove', image['image'])


@pytest.fixture
def start(machine: Container) -> Iterator[Callable[..., list[int]]]:
    """Start the program as a unit that is started again whenever it ends. Return the pids of its two processes."""
    machine.run('install', '-d', '-m', '1777', PLACE)

    def start(*properties: str, user: bool = False) -> list[int]:
        command = ('systemd-run', *(['--user'] if user else []), f'--unit={UNIT}', '-pRestart=always', '-pRestartSec=0',
                   '-pStandardOutput=null', '-pStandardError=null', *properties, '--', '/usr/bin/python3', '-I', '-c',
                   PROGRAM, PLACE)
        if user:
            as_user(machine, *command)
        else:
            machine.run(*command)
        files = [machine.path(f'{PLACE}/{name}') for name in ('main', 'child')]
        await_that('both run', lambda: all(path.exists() and path.read_text() for path in files))
        return [int(path.read_text()) for path in files]

    yield start
    machine.run('sh', '-c', f'systemctl kill --signal=KILL {UNIT}; systemctl stop {UNIT}; '
                f'systemctl reset-failed {UNIT}; rm -rf {PLACE} {RULES}')


def assert_runs(machine: Container, pids: list[int]) -> None:
    assert state(machine)['ActiveState'] == 'active'
    assert [machine.path(f'/proc/{pid}/stat').read_text().split()[2] in 'RS' for pid in pids] == [True, True]
    assert machine.property(UNIT, 'MainPID') == str(pids[0])
    assert not machine.path(f'{PLACE}/handled').exists()


@pytest.mark.parametrize('mode', ['auto', 'cgroup', 'ptrace'])
def test_it_is_stopped(machine: Container, start: Callable[..., list[int]], mode: str) -> None:
    pids = start()
    image = ctl(machine, 'checkpoint', UNIT, '--kill', '--freeze', mode)['image']
    assert state(machine) == ENDED
    assert not machine.path(f'{PLACE}/handled').exists()
    assert [machine.path(f'/proc/{pid}').exists() for pid in pids] == [False, False]
    assert list(machine.path('/run/ckptd/freezes').iterdir()) == []
    if mode == 'auto':
        assert ctl(machine, 'restore', image)['root'] == pids[0]
        machine.run('kill', '-KILL', *map(str, pids))


def test_it_was_frozen(machine: Container, start: Callable[..., list[int]]) -> None:
    start()
    machine.run('systemctl', 'freeze', UNIT)
    ctl(machine, 'checkpoint', UNIT, '--kill')
    assert state(machine) == ENDED
    assert list(machine.path('/run/ckptd/freezes').iterdir()) == []


def test_what_may_not_be_stopped_goes_on(machine: Container, start: Callable[..., list[int]]) -> None:
    pids = start('-pRefuseManualStop=yes', '-pRestart=no')
    refused = machine.run('ckptctl', 'checkpoint', UNIT, '--kill', check=False)
    assert refused.returncode != 0
    assert 'Operation refused, unit stopped.service may be requested by dependency only' in refused.stderr
    image = ctl(machine, 'list')[-1]['image']
    assert f'the tree runs on; image {image} is complete' in refused.stderr
    assert_runs(machine, pids)


def test_a_stop_that_does_not_begin_is_cancelled(machine: Container, start: Callable[..., list[int]]) -> None:
    """A unit that needs it stops first, and waits for an answer of it."""
    pids = start()
    machine.run('systemd-run', '--unit=needs-it', '-pRequires=stopped.service', '-pAfter=stopped.service',
                '-pExecStop=/bin/sleep 1000', '-pTimeoutStopSec=5s', '--', 'sleep', '1000')
    late = machine.run('ckptctl', 'checkpoint', UNIT, '--kill', '--timeout', '1', check=False)
    assert late.returncode != 0
    assert 'did not begin within 1 s' in late.stderr
    assert_runs(machine, pids)
    machine.run('systemctl', 'stop', 'needs-it.service', check=False)
    machine.run('systemctl', 'reset-failed', 'needs-it.service', check=False)


@pytest.mark.parametrize(('point', 'handled'), [('kill-stop', True), ('kill-one', False)])
def test_a_worker_that_dies_meanwhile(machine: Container, start: Callable[..., list[int]], point: str,
                                      handled: bool) -> None:
    """The stop goes on as any other, or all of the tree dies with the worker."""
    pids = start()
    settings = '/run/systemd/system/ckptd.service.d/fault.conf'
    machine.run('mkdir', '-p', settings.rpartition('/')[0])
    machine.path(settings).write_text(f'[Service]\nEnvironment=CKPTD_FAULT={point}=kill\n')
    machine.run('systemctl', 'daemon-reload')
    machine.run('systemctl', 'restart', 'ckptd.service')
    images = len(ctl(machine, 'list'))
    done = machine.run('ckptctl', 'checkpoint', UNIT, '--kill', check=False)
    machine.run('rm', settings)
    machine.run('systemctl', 'daemon-reload')
    machine.run('systemctl', 'restart', 'ckptd.service')
    assert 'SIGKILL' in done.stderr
    await_that('it ends', lambda: not any(machine.path(f'/proc/{pid}').exists() for pid in pids))
    await_that('systemd knows', lambda: state(machine)['ActiveState'] in ('inactive', 'failed'))
    assert state(machine)['NRestarts'] == '0'
    assert machine.path(f'{PLACE}/handled').exists() == handled
    assert len(ctl(machine, 'list')) == images + 1


@pytest.mark.parametrize(('command', 'mode'), [
    (('freeze',), 'unit'), (('freeze',), 'ptrace'), (('checkpoint', '--leave-frozen'), 'cgroup')])
def test_a_freeze_ends_with_its_unit(machine: Container, start: Callable[..., list[int]], command: tuple[str, ...],
                                     mode: str) -> None:
    """Otherwise the unit is killed after its TimeoutStopSec=."""
    start('-pTimeoutStopSec=60')
    machine.run('ckptctl', *command, UNIT, '--freeze', mode)
    machine.run('systemctl', 'stop', UNIT, timeout=30)
    assert state(machine) == ENDED
    assert machine.path(f'{PLACE}/handled').exists()
    held = ('busctl', 'get-property', 'org.ckptd1', '/org/ckptd1', 'org.ckptd1.Manager', 'FrozenTargets')
    await_that('it is held no more', lambda: machine.output(*held) == 'as 0')
    assert list(machine.path('/run/ckptd/freezes').iterdir()) == []


def test_a_scope(machine: Container, start: Callable[..., list[int]]) -> None:
    """It has no main process."""
    machine.run('systemd-run', '--unit=starts-scope', '--', 'systemd-run', '--scope', '--unit=stopped', 'sleep', '1000')
    await_that('it runs', lambda: machine.property('stopped.scope', 'ActiveState') == 'active')
    ctl(machine, 'checkpoint', 'stopped.scope', '--kill', '--external', 'any:close')
    assert machine.property('stopped.scope', 'LoadState') == 'not-found'


def test_users_stop_what_polkit_lets_them_stop(machine: Container, start: Callable[..., list[int]]) -> None:
    """Its processes are the user's, but the unit belongs to the manager of root."""
    pids = start('--uid=nobody')
    refused = machine.run('ckptctl', 'checkpoint', UNIT, '--kill', user='nobody', check=False)
    assert refused.returncode == 4, refused.stderr
    assert 'org.freedesktop.systemd1.manage-units' in refused.stderr
    assert_runs(machine, pids)
    machine.path(RULES).write_text(RULE)
    await_that('polkit has read it', lambda: machine.run(
        'ckptctl', 'checkpoint', UNIT, '--kill', user='nobody', check=False).returncode == 0)
    assert state(machine) == ENDED
    assert not machine.path(f'{PLACE}/handled').exists()


@pytest.mark.needs('user-session')
def test_users_stop_their_own(session: Container, start: Callable[..., list[int]]) -> None:
    start(user=True)
    as_user(session, 'ckptctl', '--user', 'checkpoint', UNIT, '--kill')
    assert state(session, '--user') == ENDED
    assert not session.path(f'{PLACE}/handled').exists()

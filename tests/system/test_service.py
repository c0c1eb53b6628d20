# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptd as a service of a real systemd: activated by a call, checkpointing units, seen through systemd's own eyes."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.programs.conftest import await_that
from tests.system.container import ROOT, Container

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl')

SYSTEMD = 'org.freedesktop.systemd1.Manager'
MANAGER = ('org.ckptd1', '/org/ckptd1', 'org.ckptd1.Manager')
LAST = '/said/last'      # a path
RECIPES = '<!-- recipes: tests/system/test_service.py runs this block -->\n```sh\n'


@pytest.fixture(autouse=True)
def no_image_left(machine: Container) -> Iterator[None]:
    yield
    for image in ctl(machine, 'list'):
        ctl(machine, 'remove', image['image'])


def ctl(machine: Container, *args: str) -> Any:
    """ckptctl --json on the system bus, decoded; images and jobs as lists."""
    done = machine.run('ckptctl', '--json', *args)
    return json.loads(done.stdout) if done.stdout.strip() else None


def count_of(machine: Container, unit: str, directory: str = '/run') -> tuple[int, int]:
    """(pid, count) that the unit has written last; (0, 0) before it did."""
    done = machine.run('cat', f'{directory}/{unit.removesuffix(".service")}', check=False)
    pid, count = done.stdout.split() or (0, 0)
    return int(pid), int(count)


def await_count(machine: Container, unit: str, above: int, directory: str = '/run') -> tuple[int, int]:
    """Poll the file of the running process from outside: the counter knows of nobody to tell."""
    main = int(machine.property(unit, 'MainPID'))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, count = count_of(machine, unit, directory)
        if pid == main and count > above:
            return pid, count
    raise AssertionError(f'{unit} does not count: {machine.run("systemctl", "status", unit, check=False).stdout}')


@contextlib.contextmanager
def overheard(machine: Container, interface: str, member: str) -> Iterator[list[str]]:
    """Calls or signals of this name meanwhile, as `busctl monitor` shows them: a view that is not ckptd's."""
    machine.run('systemd-run', f'--unit=listener-{member}', f'-pStandardOutput=truncate:/run/heard-{member}',
                f'-pStandardError=truncate:/run/listening-{member}', '--', 'busctl', 'monitor', '--json=short',
                f"--match=interface='{interface}',member='{member}'")
    deadline = time.monotonic() + 10
    while 'Monitoring' not in machine.run('cat', f'/run/listening-{member}', check=False).stdout:
        assert time.monotonic() < deadline, 'busctl monitor does not start'
    heard: list[str] = []
    try:
        yield heard
    finally:
        # what was said before the last that it shows, it has shown
        machine.run('busctl', 'emit', LAST, interface, member)
        deadline = time.monotonic() + 10
        while LAST not in machine.output('cat', f'/run/heard-{member}'):
            assert time.monotonic() < deadline, 'busctl monitor does not go on'
        machine.run('systemctl', 'stop', f'listener-{member}.service')
        heard += [line for line in machine.output('cat', f'/run/heard-{member}').splitlines()
                  if f'"{member}"' in line and LAST not in line]


def test_a_call_activates_the_service(machine: Container) -> None:
    machine.run('systemctl', 'stop', 'ckptd.service')
    assert machine.property('ckptd.service', 'ActiveState') == 'inactive'
    version = machine.output('busctl', 'get-property', *MANAGER, 'Version')
    assert version.startswith('s "')
    assert machine.property('ckptd.service', 'ActiveState') == 'active'
    assert machine.property('ckptd.service', 'Type') == 'notify'


def test_it_ends_when_nobody_wants_anything(machine: Container, service: Callable[[str], str]) -> None:
    """And is started again by the next call, with all that there was."""
    unit = service('counter.service')
    await_count(machine, unit, 0)
    image = ctl(machine, 'checkpoint', unit)['image']
    machine.run('mkdir', '-p', '/etc/ckptd/ckptd.conf.d')
    settings = r'[Manager]\nIdleExitSec=1s\nKeepJobsSec=1s\n'
    machine.run('sh', '-c', f'printf "{settings}" > /etc/ckptd/ckptd.conf.d/idle.conf')
    machine.run('systemctl', 'restart', 'ckptd.service')
    machine.run('timeout', '20', 'sh', '-c', 'while systemctl is-active -q ckptd.service; do sleep 0.1; done')
    assert machine.property('ckptd.service', 'Result') == 'success'
    machine.run('rm', '-r', '/etc/ckptd')
    assert [one['image'] for one in ctl(machine, 'list')] == [image]
    assert machine.property('ckptd.service', 'ActiveState') == 'active'


def test_checkpoint_of_a_unit_frozen_by_systemd(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('counter.service')
    pid, before = await_count(machine, unit, 0)
    with overheard(machine, SYSTEMD, 'FreezeUnit') as freezes, overheard(machine, SYSTEMD, 'ThawUnit') as thaws:
        result = ctl(machine, 'checkpoint', unit, '--freeze', 'unit')
    assert len(freezes) == 1
    assert unit in freezes[0]
    assert len(thaws) == 1
    assert result['tasks'] == 1
    assert result['pages_written'] > 100
    assert result['frozen_time'] <= result['total_time']
    after_pid, _ = await_count(machine, unit, before + 5)
    assert after_pid == pid
    assert machine.property(unit, 'FreezerState') == 'running'
    assert machine.property(unit, 'NRestarts') == '0'
    machine.run('ckptctl', 'verify', result['image'])


WATCHER = """
import ctypes, os, tempfile
path = tempfile.mkdtemp(dir='/tmp')
os.mkdir(path + '/below')
watched = ctypes.CDLL(None).inotify_init1(0)
assert ctypes.CDLL(None).inotify_add_watch(watched, os.fsencode(path + '/below'), 0x100) == 1
os.chdir('/')
print(path, flush=True)
os.read(watched, 4096)
"""


@pytest.mark.parametrize('user', ['root', 'nobody'])
def test_watched_files_are_found_in_the_sandbox(machine: Container, user: str) -> None:
    """The system call for it is none that services make, and the paths are those of another mount namespace."""
    machine.run('systemd-run', '--unit=watcher', f'--uid={user}', '-pStandardOutput=append:/run/watcher.log', '--',
                '/usr/bin/python3', '-I', '-c', WATCHER)
    try:
        await_that('it watches', lambda: '/tmp/' in machine.run('cat', '/run/watcher.log', check=False).stdout)
        result = ctl(machine, 'checkpoint', 'watcher.service')
        path = machine.output('cat', '/run/watcher.log').strip()
        machine.run('grep', '-aFq', f'{path}/below', f'/var/spool/ckptd/{result["image"]}/files.img')
    finally:
        machine.run('systemctl', 'stop', 'watcher.service')
        machine.run('rm', '-f', '/run/watcher.log')


def test_automatic_choice_for_a_unit_is_systemd(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('counter.service')
    _, before = await_count(machine, unit, 0)
    image = ctl(machine, 'checkpoint', unit)['image']
    manifest = json.loads(machine.output('cat', f'/var/spool/ckptd/{image}/manifest.json'))
    assert manifest['freeze_mode'] == 'unit'
    await_count(machine, unit, before)


def test_unit_stays_frozen_and_is_thawed(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('counter.service')
    await_count(machine, unit, 0)
    machine.run('ckptctl', 'freeze', unit)
    assert machine.property(unit, 'FreezerState') == 'frozen'
    _, frozen_at = count_of(machine, unit)
    assert machine.output('busctl', 'get-property', *MANAGER, 'FrozenTargets') == f'as 1 "{unit}"'
    assert count_of(machine, unit)[1] == frozen_at
    machine.run('ckptctl', 'thaw', unit)
    await_count(machine, unit, frozen_at)


def test_daemon_that_is_stopped_lets_go(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('counter.service')
    _, count = await_count(machine, unit, 0)
    machine.run('ckptctl', 'freeze', unit)
    machine.run('systemctl', 'stop', 'ckptd.service')
    assert machine.property(unit, 'FreezerState') == 'running'
    await_count(machine, unit, count)


def test_daemon_that_is_killed_thaws_at_its_next_start(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('counter.service')
    _, count = await_count(machine, unit, 0)
    machine.run('ckptctl', 'freeze', unit)
    machine.run('systemctl', 'kill', '--signal=KILL', 'ckptd.service')
    # Restart= or activation, whichever is first; the daemon that dies may still have got the first call
    await_that('another one', lambda: machine.run('busctl', 'get-property', *MANAGER, 'Version', check=False
                                                  ).returncode == 0)
    await_count(machine, unit, count)
    assert machine.property(unit, 'FreezerState') == 'running'


def test_hook_checkpoints_before_the_stop(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('hooked.service')
    pid, _ = await_count(machine, unit, 0)
    machine.run('systemctl', 'stop', unit)
    images = ctl(machine, 'list')
    assert len(images) == 1, machine.journal(unit)
    assert (images[0]['tasks'], images[0]['target']) == (1, unit)
    assert machine.property(unit, 'Result') == 'success'
    assert machine.output('cat', '/run/hooked.log') == ''
    machine.run('rm', '/run/hooked')
    assert ctl(machine, 'restore', images[0]['image'])['root'] == pid
    await_that('it counts on', lambda: count_of(machine, unit)[0] == pid)
    machine.run('kill', '-KILL', str(pid))


def test_hook_of_a_service_that_has_ended(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('hooked.service')
    pid, _ = await_count(machine, unit, 0)
    machine.run('kill', '-TERM', str(pid))
    await_that('it has ended', lambda: machine.property(unit, 'ActiveState') in ('inactive', 'failed'))
    assert ctl(machine, 'list') == []
    assert machine.output('cat', '/run/hooked.log') == ''


def test_users_have_their_own_and_no_others(machine: Container, service: Callable[[str], str]) -> None:
    own, foreign = service('of-nobody.service'), service('counter.service')
    await_count(machine, own, 0, '/tmp')
    await_count(machine, foreign, 0)
    done = machine.run('ckptctl', '--json', 'checkpoint', own, '--freeze', 'ptrace', user='nobody')
    image = json.loads(done.stdout)['image']
    refused = machine.run('ckptctl', 'checkpoint', foreign, user='nobody', check=False)
    assert refused.returncode == 4, refused.stderr
    assert 'hint' in refused.stderr
    assert machine.run('ls', '/var/spool/ckptd', user='nobody', check=False).returncode != 0
    machine.run('ckptctl', 'remove', image, user='nobody')


def test_recipes_of_the_manual(machine: Container, service: Callable[[str], str]) -> None:
    """The block is run as it stands; each busctl line must succeed."""
    unit = service('counter.service')
    pid, count = await_count(machine, unit, 0)
    block = (ROOT / 'docs/org.ckptd1.7.md').read_text().partition(RECIPES)[2].partition('```')[0]
    assert block.count('busctl') > 15
    script = f'set -eu; cd /tmp; pid={pid}\n{block}'
    done = machine.run('bash', '-c', script, check=False)
    assert done.returncode == 0, f'{done.stdout}{done.stderr}{machine.journal("ckptd.service")}'
    await_count(machine, unit, count)


def test_signals_are_seen_by_busctl_monitor(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('counter.service')
    await_count(machine, unit, 0)
    manager = MANAGER[2]
    with overheard(machine, manager, 'JobNew') as new, overheard(machine, 'org.ckptd1.Job', 'Progress') as progress, \
            overheard(machine, manager, 'JobRemoved') as removed, overheard(machine, manager, 'ImageAdded') as added:
        image = ctl(machine, 'checkpoint', unit)['image']
    assert len(new) == len(removed) == len(added) == 1
    assert '"done"' in removed[0]
    assert image in added[0]
    assert progress


def test_only_root_may_be_ckptd(machine: Container) -> None:
    """The bus policy: anybody may talk to the name, nobody else may own it."""
    machine.run('systemctl', 'stop', 'ckptd.service')
    done = machine.run('busctl', 'call', 'org.freedesktop.DBus', '/org/freedesktop/DBus', 'org.freedesktop.DBus',
                       'RequestName', 'su', 'org.ckptd1', '0', user='nobody', check=False)
    assert done.returncode != 0
    assert 'denied' in done.stderr.lower() or 'not allowed' in done.stderr.lower() or 'permi' in done.stderr.lower()
    assert machine.output('busctl', 'get-property', *MANAGER, 'Version', user='nobody').startswith('s ')

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree that an ordinary user brings back through the system's ckptd: it is the user's, and so is its place."""

import json
from collections.abc import Iterator

import pytest

from tests.system.conftest import UID, USER
from tests.system.container import Container
from tests.system.test_user import await_count

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl', 'user-session')

SETS = ('CapInh', 'CapPrm', 'CapEff', 'CapAmb')
COUNT = ('/usr/local/bin/count', '/tmp/owned')


def by_session(machine: Container) -> int:
    """A program in a scope of the user's slice, as logind makes one for each session; its pid."""
    started = machine.run('systemd-run', '--scope', '--quiet', f'--slice=user-{UID}.slice', f'--uid={USER}',
                          f'--gid={USER}', '--', 'sh', '-c',
                          f'setsid {" ".join(COUNT)} </dev/null >/dev/null 2>&1 & echo $!')
    return int(started.stdout)


def by_unit(machine: Container) -> int:
    """The main process of a transient unit that runs as the user; its pid."""
    machine.run('systemd-run', '--unit=owned', f'--uid={USER}', f'--gid={USER}', '-pStandardOutput=null',
                '-pStandardError=null', '--', *COUNT)
    return int(machine.property('owned.service', 'MainPID'))


@pytest.fixture(params=[by_session, by_unit], ids=['session', 'unit'])
def pid(session: Container, request: pytest.FixtureRequest) -> Iterator[int]:
    pid = request.param(session)
    await_count(session, 'owned', 0)
    yield pid
    session.run('kill', '-KILL', str(pid), check=False)
    session.run('systemctl', 'reset-failed', 'owned.service', check=False)
    session.run('rm', '-f', '/tmp/owned')


def test_a_users_tree_comes_back_in_the_users_slice(session: Container, pid: int) -> None:
    """Whatever unit it was in is gone by then; its user's limits are those of the slice."""
    done = session.run('ckptctl', '--json', 'checkpoint', str(pid), '--kill', user=USER)
    session.run('sh', '-c', f'while [ -e /proc/{pid} ]; do sleep 0.02; done')
    count = await_count(session, 'owned', 0)
    session.run('ckptctl', '--json', 'restore', json.loads(done.stdout)['image'], user=USER)
    await_count(session, 'owned', count)
    [cgroup] = [line[3:] for line in session.output('cat', f'/proc/{pid}/cgroup').splitlines() if line[:3] == '0::']
    assert cgroup.startswith(f'/user.slice/user-{UID}.slice/')
    for status in session.output('sh', '-c', f'cat /proc/{pid}/task/*/status').split('\nName:'):
        rows = dict(line.split(':\t', 1) for line in status.splitlines() if ':\t' in line)
        assert {name: int(rows[name], 16) for name in SETS} == dict.fromkeys(SETS, 0)
        assert set(rows['Uid'].split()) == {str(UID)}


def test_what_no_new_privs_leaves(session: Container, pid: int) -> None:
    """The shipped unit has a mount namespace of its own, which is no sandbox of its callers; theirs is."""
    assert session.run('ckptctl', 'checkpoint', str(pid), user=USER).returncode == 0
    denied = session.run('setpriv', '--no-new-privs', 'ckptctl', 'checkpoint', str(pid), user=USER, check=False)
    assert denied.returncode == 4, denied.stderr
    assert 'no_new_privs' in denied.stderr
    session.run('setpriv', '--no-new-privs', 'sh', '-euc', 'setsid sleep 1000 </dev/null >/dev/null 2>&1 &\n'
                'exec ckptctl checkpoint $! --kill', user=USER)     # whose child that is now


def test_two_rounds_without_any_root(session: Container, pid: int) -> None:
    """--standalone: a daemon, spawner and worker that are the user. The counter goes on from where it was."""
    session.run('systemctl', 'stop', 'ckptd.service')
    alone, count = ('--standalone', '--spool', f'/home/{USER}/alone', '--json'), 0
    root = pid
    for _ in range(2):
        count = await_count(session, 'owned', count)
        done = session.run('ckptctl', 'checkpoint', str(root), '--kill', *alone, user=USER)
        session.run('sh', '-c', f'while [ -e /proc/{root} ]; do sleep 0.02; done')
        count = await_count(session, 'owned', count - 1)
        done = session.run('ckptctl', 'restore', json.loads(done.stdout)['image'], *alone, user=USER)
        root = json.loads(done.stdout)['root']
        assert await_count(session, 'owned', count) < count + 1000
        assert session.run('pgrep', '--uid=root', '--full', 'python.*ckptd', check=False).stdout == ''
    session.run('kill', '-KILL', str(root))

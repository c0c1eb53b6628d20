# SPDX-License-Identifier: LGPL-2.1-or-later
"""A caller in a sandbox: what it has started itself it may checkpoint and freeze, what is outside it may not reach, and
nothing comes back to life for it."""

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptd.bus.names import JOB, MANAGER, image_path
from ckptd.client import connect as ckptd_of
from ckptd.kernel.confinement import Restrictions, confinement, hint_for, listed, machine_restrictions, own_restrictions
from tests.daemon.test_callers import NOBODY, Busctl, sleeping
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT as SOURCE
from tests.lib.bus import PrivateBus, Served
from tests.programs.conftest import await_that

pytestmark = pytest.mark.needs('root', 'cgroup2', 'ptrace', 'dbus', 'unshare')

DENIED = 4      # the exit status of PermissionDenied
BOUNDING = 'a reduced capability bounding set'


@dataclass(frozen=True)
class Sandbox:
    """command: what puts it on, way: or what the program itself does. words: what a refusal says of it."""
    words: str
    command: tuple[str, ...] = ()
    way: str = ''


def own(what: str) -> str:
    return f'a {what} namespace of its own'


SANDBOXES = {
    'no_new_privs': Sandbox('no_new_privs', ('setpriv', '--no-new-privs')),
    'seccomp': Sandbox('a seccomp filter', way='seccomp'),
    'bounding': Sandbox(BOUNDING, ('setpriv', '--bounding-set=-sys_boot')),
    'mount': Sandbox(own('mount'), ('unshare', '--mount')),
    'net': Sandbox(own('network'), ('unshare', '--net')),
    'uts': Sandbox(own('UTS'), ('unshare', '--uts')),
    'ipc': Sandbox(own('IPC'), ('unshare', '--ipc')),
    'cgroup': Sandbox(own('cgroup'), ('unshare', '--cgroup')),
    'user': Sandbox(own('user'), ('unshare', '--user', '--map-root-user')),
}
FREE = Sandbox('')


def in_sandbox(sandbox: Sandbox, uid: int, address: str, *commands: str) -> list[tuple[int, str]]:
    """Exit status and words of each command of ckptctl, all of one process."""
    done = subprocess.run([*sandbox.command, sys.executable, '-m', 'tests.daemon.confined', str(uid), sandbox.way,
                           address, *commands], capture_output=True, text=True, timeout=60, check=False, cwd=SOURCE)
    assert done.returncode == 0, done.stderr
    return [(status, said) for status, said in json.loads(done.stdout)]


@pytest.fixture
def bus(private_bus: PrivateBus, on_bus: object) -> PrivateBus:
    """With a daemon on it."""
    return private_bus


# in a user namespace whose only uid is root's one becomes nobody else
@pytest.mark.parametrize(('name', 'uid'), [(name, uid) for name in SANDBOXES for uid in (0, NOBODY)
                                           if (name, uid) != ('user', NOBODY)])
def test_a_sibling_and_ones_own_child(bus: PrivateBus, name: str, uid: int) -> None:
    with sleeping(uid) as sibling:
        target = f'pid:{sibling.pid}'
        answers = in_sandbox(SANDBOXES[name], uid, bus.address, f'freeze {target}', f'checkpoint {target}',
                             f'checkpoint {target} --kill', f'inhibit {target} true',
                             'freeze pid:CHILD', 'thaw pid:CHILD', 'checkpoint pid:CHILD')
        assert sibling.poll() is None
    assert [status for status, _ in answers] == [DENIED] * 4 + [0] * 3, answers
    for _, said in answers[:4]:
        assert SANDBOXES[name].words in said
        assert 'call from outside of the sandbox' in said


def test_without_a_sandbox(bus: PrivateBus) -> None:
    with sleeping(NOBODY) as sibling:
        answers = in_sandbox(FREE, NOBODY, bus.address, f'freeze pid:{sibling.pid}', f'thaw pid:{sibling.pid}')
    assert [status for status, _ in answers] == [0, 0], answers


@pytest.mark.parametrize('uid', [0, NOBODY])
def test_in_a_pid_namespace_what_is_outside_is_not_there(bus: PrivateBus, uid: int) -> None:
    """The bus says which process it is as everybody else sees it; 'self' is the caller."""
    sandbox = Sandbox('', ('unshare', '--pid', '--fork', '--mount-proc'))
    with sleeping(uid) as sibling, subprocess.Popen(['true']) as dead:
        dead.wait()
        answers = in_sandbox(sandbox, uid, bus.address, *(
            f'{command} pid:{pid}' for command in ('freeze', 'checkpoint', 'check', 'tree')
            for pid in (sibling.pid, dead.pid)), 'tree self')
        words = [said.replace(f'{sibling.pid}', 'N').replace(f'{dead.pid}', 'N') for _, said in answers]
    assert [status for status, _ in answers] == [5] * 8 + [0], answers
    assert words[:8:2] == words[1:8:2]
    assert 'sleep' in words[8]


def test_what_check_says(bus: PrivateBus) -> None:
    with sleeping(NOBODY) as sibling:
        [(status, said)] = in_sandbox(SANDBOXES['mount'], NOBODY, bus.address, f'check pid:{sibling.pid} --json')
    assert status == DENIED
    [row] = json.loads(said)['refusals']
    assert (row['pid'], row['resource'], row['errno']) == (sibling.pid, 'confinement', 'EPERM')
    assert 'a mount namespace of its own' in row['reason']


class NoNewPrivs(Busctl):
    """busctl, with no_new_privs."""

    def call(self, interface: str, member: str, *arguments: str, path: str = '/org/ckptd1') -> Any:
        done = subprocess.run(['setpriv', '--no-new-privs', 'busctl', f'--address={self._bus.address}', '--json=short',
                               'call', 'org.ckptd1', path, interface, member, *arguments], capture_output=True,
                              text=True, timeout=30, check=False, user=self._uid, group=self._uid, extra_groups=[],
                              cwd='/')
        if done.returncode:
            return done.stderr.strip()
        return json.loads(done.stdout)['data'] if done.stdout else None


@pytest.fixture(params=[0, NOBODY])
def confined(request: pytest.FixtureRequest, bus: PrivateBus) -> NoNewPrivs:
    return NoNewPrivs(bus, request.param)


@pytest.fixture
def image(tmp_path: Path) -> str:
    """One of nobody's, there before the daemon is."""
    spool = tmp_path / 'spool'
    spool.mkdir(mode=0o700)
    return write_image(spool, NOBODY)


def test_no_image_is_reached(image: str, confined: NoNewPrivs) -> None:
    """What it has checkpointed itself neither: an image is of a time at which nobody knows what it was below."""
    for member, arguments in (('Restore', ['sa{sv}', image, '0']), ('CheckRestore', ['sa{sv}', image, '0']),
                              ('VerifyImage', ['s', image]), ('RemoveImage', ['s', image])):
        answer = confined.call(MANAGER, member, *arguments)
        assert 'outside of what the caller may reach, confined by no_new_privs' in answer, member
    for member in ('Tree', 'Open', 'Verify', 'Remove'):
        answer = confined.call('org.ckptd1.Image', member, path=image_path(image))
        assert 'outside of what the caller may reach, confined by no_new_privs' in answer, member
    assert image in str(confined.call(MANAGER, 'ListImages'))


def test_what_is_frozen_outside_stays_so(bus: PrivateBus, confined: NoNewPrivs) -> None:
    free = Busctl(bus, confined._uid)
    with sleeping(confined._uid) as process:
        target = f'pid:{process.pid}'
        assert free.call(MANAGER, 'Freeze', 'sa{sv}', target, '0') == [1]
        assert 'confined by no_new_privs' in confined.call(MANAGER, 'Thaw', 'sa{sv}', target, '0')
        assert free.call(MANAGER, 'Thaw', 'sa{sv}', target, '0') is None


async def test_no_job_that_was_asked_for_outside(private_bus: PrivateBus, tmp_path: Path) -> None:
    config = tmp_path / 'ckptd.conf'
    config.write_text('[Manager]\nInhibitDelayMaxSec=1h\n')
    with sleeping(0) as process, Served(private_bus.address, tmp_path, tmp_path / 'spool', ('--config', str(config))):
        async with ckptd_of(private_bus.address) as ckptd:
            with await ckptd.inhibit('a test', 'it looks meanwhile', f'pid:{process.pid}'):
                job = await ckptd.checkpoint(f'pid:{process.pid}')
                answer = await asyncio.to_thread(NoNewPrivs(private_bus, 0).call, JOB, 'Cancel', 'a{sv}', '0',
                                                 path=job.path)
                assert 'confined by no_new_privs' in answer
                await job.cancel()
    await asyncio.get_running_loop().shutdown_default_executor()


# a process that connects, leaves its connection to a child, and ends; the child then sends what it reads
HEIR = """
import asyncio, concurrent.futures.thread, os, sys
sys.path.insert(0, sys.argv[2])
from ckptd.bus import wire
from ckptd.bus.connection import Connection
from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
uid = int(sys.argv[3])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
call = wire.make_call(BUS_NAME, ROOT, MANAGER, 'Checkpoint', 'sa{sv}', [sys.argv[4], {}])
call.serial = 7
data = wire.marshal(call)
async def main():
    connection = await Connection.open(sys.argv[1])
    if os.fork() == 0:
        os.read(0, 1)
        os.write(connection._sock.fileno(), data)
        os.read(0, 1)
    os._exit(0)
asyncio.run(main())
"""


@pytest.mark.parametrize('uid', [0, NOBODY])
def test_a_caller_that_is_gone_before_it_is_looked_at(private_bus: PrivateBus, tmp_path: Path, uid: int) -> None:
    """What it was confined by nobody knows."""
    with (Served(private_bus.address, tmp_path, tmp_path / 'spool', ('--verbose',)) as daemon, sleeping(uid) as process,
          subprocess.Popen([sys.executable, '-c', HEIR, private_bus.address, str(SOURCE), str(uid),
                            f'pid:{process.pid}'], stdin=subprocess.PIPE) as caller):
        assert caller.stdin is not None
        assert caller.wait(30) == 0
        caller.stdin.write(b'1')
        caller.stdin.flush()
        await_that('it is refused', lambda: 'rule=org.ckptd1.leave-confinement' in daemon.log)
        assert 'refused method=Checkpoint' in daemon.log
        assert daemon.call('ListJobs') == [[]]
        caller.stdin.close()


# ---------------------------------------------------------------- daemons of one's own

@pytest.mark.parametrize('name', ['no_new_privs', 'mount'])
def test_a_daemon_of_ones_own_within_the_sandbox(name: str, tmp_path: Path) -> None:
    """It has what its client has, and nothing more to give."""
    with sleeping(0) as sibling:
        done = subprocess.run([*SANDBOXES[name].command, sys.executable, '-m', 'ckptd.cli', 'checkpoint',
                               f'pid:{sibling.pid}', '--standalone', '--spool', str(tmp_path / 'spool')],
                              capture_output=True, text=True, timeout=60, check=False, cwd=SOURCE)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what is compared

def restrictions(**differing: Any) -> Restrictions:
    usual = Restrictions(False, 0, 0, 0xFF, {'mnt': 1, 'pid': 2, 'net': 3, 'user': 4, 'uts': 5, 'ipc': 6, 'cgroup': 7,
                                       'time': 8})
    return usual._replace(**differing)


@pytest.mark.parametrize(('of', 'base', 'found'), [
    (restrictions(), restrictions(), ()), (restrictions(no_new_privs=True), restrictions(), ('no_new_privs',)),
    (restrictions(no_new_privs=True), restrictions(no_new_privs=True), ()),
    (restrictions(), restrictions(no_new_privs=True), ()),
    (restrictions(seccomp=2, filters=1), restrictions(), ('a seccomp filter',)),
    # a container of which all are under one
    (restrictions(seccomp=2, filters=1), restrictions(seccomp=2, filters=1), ()),
    (restrictions(seccomp=2, filters=2), restrictions(seccomp=2, filters=1), ('a seccomp filter',)),
    (restrictions(seccomp=2, filters=1), restrictions(seccomp=2, filters=2), ()),
    (restrictions(seccomp=1), restrictions(), ('a seccomp filter',)),
    (restrictions(bounding=0xFE), restrictions(), (BOUNDING,)), (restrictions(), restrictions(bounding=0xFE), ()),
    (restrictions(namespaces={**restrictions().namespaces, 'time': 9}), restrictions(), ()),
    (restrictions(namespaces={**restrictions().namespaces, 'net': 9, 'user': 9}), restrictions(),
     (own('user'), own('network'))),
])
def test_what_confines(of: Restrictions, base: Restrictions, found: tuple[str, ...]) -> None:
    assert confinement(of, base) == found


def test_of_whose_namespaces_nothing_is_known_is_confined_by_all() -> None:
    assert len(confinement(restrictions(namespaces={}), restrictions())) == 7


def test_we_are_not_confined_here() -> None:
    assert confinement(own_restrictions(), machine_restrictions()) == ()


def test_words() -> None:
    assert listed(['a']) == 'a'
    assert listed(['a', 'b', 'c']) == 'a, b and c'
    assert 'ExecStop=+' in hint_for(['no_new_privs'])

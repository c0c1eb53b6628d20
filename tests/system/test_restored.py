# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that is killed and brought back under a real systemd: it goes on, and is under nothing of the daemon's."""

from collections.abc import Callable, Iterator

import pytest

from tests.system.container import Container
from tests.system.test_service import await_count, await_that, count_of, ctl

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl')

KEPT = ('Seccomp', 'Seccomp_filters', 'NoNewPrivs', 'CapBnd', 'CapEff', 'CapPrm', 'CapInh', 'CapAmb', 'Uid', 'Gid',
        'Groups')
NAMESPACES = ('mnt', 'pid', 'net', 'ipc', 'uts', 'user', 'cgroup', 'time')


@pytest.fixture(autouse=True)
def no_image_left(machine: Container) -> Iterator[None]:
    yield
    for image in ctl(machine, 'list'):
        ctl(machine, 'remove', image['image'])


def picture(machine: Container, pid: int) -> dict[str, str]:
    """What a task has of its creator for good."""
    rows = dict(line.split(':\t', 1) for line in machine.output('cat', f'/proc/{pid}/status').splitlines()
                if ':\t' in line)
    spaces = {name: machine.output('readlink', f'/proc/{pid}/ns/{name}') for name in NAMESPACES}
    return {name: rows[name].strip() for name in KEPT} | spaces


def counted_on(machine: Container, pid: int, above: int, name: str = 'counter') -> None:
    """The restored counter writes its file again, under its old pid."""
    machine.run('timeout', '20', 'sh', '-c',
                f'until read -r pid count < /run/{name}; [ "$pid" = {pid} ] && [ "$count" -gt {above} ]; '
                'do sleep 0.05; done')


@pytest.fixture
def killed(machine: Container, service: Callable[[str], str]) -> Iterator[tuple[str, int, dict[str, str]]]:
    """Image, pid and picture of a counter that is dead."""
    unit = service('counter.service')
    pid, _ = await_count(machine, unit, 5)
    before = picture(machine, pid)
    image = ctl(machine, 'checkpoint', unit, '--kill')['image']
    machine.run('sh', '-c', f'while [ -e /proc/{pid} ]; do sleep 0.02; done')
    yield image, pid, before
    machine.run('kill', '-KILL', str(pid), check=False)


def test_it_goes_on_outside_of_the_daemon(machine: Container, killed: tuple[str, int, dict[str, str]]) -> None:
    image, pid, before = killed
    _, count = count_of(machine, 'counter.service')
    result = ctl(machine, 'restore', image)
    assert result['root'] == pid
    counted_on(machine, pid, count)
    assert picture(machine, pid) == before
    where = machine.output('cat', f'/proc/{pid}/cgroup')
    assert 'ckptd.service' not in where
    assert 'ckptd-restore-' not in where
    # neither the end of its worker nor that of the daemon is its own
    machine.run('systemctl', 'restart', 'ckptd.service')
    _, count = count_of(machine, 'counter.service')
    counted_on(machine, pid, count)
    assert machine.output('systemctl', 'list-units', '--all', '--plain', '--no-legend', 'ckptd-restore-*') == ''


def test_a_service_with_filters(machine: Container, service: Callable[[str], str]) -> None:
    """The daemon is under filters itself, so a worker outside of its sandbox dumps and checks it."""
    unit = service('filtered.service')
    pid, _ = await_count(machine, unit, 5)
    before = picture(machine, pid)
    assert before['Seccomp'] == '2'
    assert int(before['Seccomp_filters']) >= 3
    assert ctl(machine, 'check', unit)['refusals'] == []
    image = ctl(machine, 'checkpoint', unit, '--kill')['image']
    machine.run('sh', '-c', f'while [ -e /proc/{pid} ]; do sleep 0.02; done')
    _, count = count_of(machine, unit)
    assert ctl(machine, 'restore', image)['root'] == pid
    counted_on(machine, pid, count, 'filtered')
    assert picture(machine, pid) == before
    machine.run('kill', '-KILL', str(pid))


def test_a_service_that_no_restart_brings_back_is_not_killed(machine: Container,
                                                             service: Callable[[str], str]) -> None:
    """It has a mount namespace of its own, as for PrivateTmp=, which ends with it."""
    unit = service('private.service')
    pid, count = await_count(machine, unit, 5)
    warnings = ctl(machine, 'check', unit)['warnings']
    assert [(row['resource'], row['severity']) for row in warnings if row['resource'].startswith('namespace')] == [
        ('namespace mnt', 'unrestorable')]
    refused = machine.run('ckptctl', 'checkpoint', unit, '--kill', check=False)
    assert refused.returncode == 3, refused.stderr
    assert 'mnt namespace of its own' in refused.stderr
    counted_on(machine, pid, count, 'private')
    image = ctl(machine, 'checkpoint', unit)['image']
    there = machine.run('ckptctl', 'restore', image, '--new-pidns', '--dry-run', check=False)
    assert there.returncode == 3, there.stdout
    assert 'namespace mnt' in there.stdout
    ctl(machine, 'checkpoint', unit, '--kill', '--force')
    machine.run('sh', '-c', f'while [ -e /proc/{pid} ]; do sleep 0.02; done')


def test_a_daemon_that_stops_lets_go_of_what_it_attends(machine: Container,
                                                        killed: tuple[str, int, dict[str, str]]) -> None:
    image, pid, _ = killed
    machine.run('systemd-run', '--unit=attendant', '--', '/usr/bin/ckptctl', 'restore', image, '--wait')
    _, count = count_of(machine, 'counter.service')
    counted_on(machine, pid, count)
    machine.run('systemctl', 'stop', 'ckptd.service')
    _, count = count_of(machine, 'counter.service')
    counted_on(machine, pid, count)
    machine.run('systemctl', 'stop', 'attendant.service', check=False)
    machine.run('systemctl', 'reset-failed', 'attendant.service', check=False)


def test_what_stands_in_the_way_is_seen_from_outside_the_sandbox(machine: Container,
                                                                 service: Callable[[str], str]) -> None:
    """The daemon's own view of files is read-only; that of the worker that would restore is not."""
    unit = service('counter.service')
    pid, _ = await_count(machine, unit, 5)
    image = ctl(machine, 'checkpoint', unit)['image']
    done = machine.run('ckptctl', 'restore', image, '--dry-run', check=False)
    assert done.returncode == 75, done.stdout + done.stderr      # try again: it may end
    assert f'the pid is in use by count[{pid}]' in done.stdout
    assert 'Read-only' not in done.stdout


def test_not_beside_another_instance(machine: Container, killed: tuple[str, int, dict[str, str]]) -> None:
    image, pid, _ = killed
    machine.run('systemctl', 'start', 'counter.service')
    refused = machine.run('ckptctl', 'restore', image, check=False)
    assert refused.returncode == 75, refused.stderr
    assert 'another instance of it runs' in refused.stderr
    assert 'systemctl stop counter.service' in refused.stderr
    # what the unit itself asks for is no other instance
    within = 'echo $$ > /sys/fs/cgroup/system.slice/counter.service/cgroup.procs && exec "$@"'
    machine.run('sh', '-c', within, 'sh', 'ckptctl', 'restore', image, '--dry-run')
    assert ctl(machine, 'restore', image, '--force')['root'] == pid
    machine.run('kill', '-KILL', str(pid), check=False)     # it may have failed already: both write one file
    machine.run('systemctl', 'stop', 'counter.service')
    assert ctl(machine, 'restore', image)['root'] == pid


HALF_ROLLED_BACK = """
import os
from pathlib import Path
from ckptd.journal import Journal
from ckptd.journal.steps import KeepFile, MakeFile
from ckptd.journal.steps.files import keep
path, kept = '/root/of-the-tree', '/var/spool/ckptd/.kept-test'
Path(path).write_text('as it was found')
entry = Journal(Path('/run/ckptd')).begin(1, 'image x', 'restore')
entry.add(MakeFile(kept, 0, 0, 0, 0, ()))
with open(path, 'rb') as source, open(kept, 'xb+') as target:
    keep(source.fileno(), 0, target.fileno())
of = os.stat(path)
entry.add(KeepFile(path, of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, 0, kept))
Path(path).write_text('half rolled back, and then the worker died')
os._exit(0)
"""


def test_files_are_put_back_outside_of_the_sandbox(machine: Container) -> None:
    """In which /root is read-only."""
    machine.run('systemctl', 'stop', 'ckptd.service')
    machine.run('mkdir', '-p', '-m', '700', '/run/ckptd')
    machine.run('/usr/lib/ckptd/bin/python', '-c', HALF_ROLLED_BACK)
    machine.run('systemctl', 'start', 'ckptd.service')
    assert machine.output('cat', '/root/of-the-tree') == 'as it was found'
    assert machine.run('ls', '/var/spool/ckptd/.kept-test', check=False).returncode != 0
    assert 'undone rolling back /root/of-the-tree' in machine.journal('ckptd.service')
    machine.run('rm', '/root/of-the-tree')


# a server with a client of it, over TCP and a unix socket, whose output is the journal's
SERVER = """
import os, socket
tcp, datagrams = socket.create_server(('127.0.0.1', 7777)), socket.socket(type=socket.SOCK_DGRAM)
unix = socket.socket(1)
datagrams.bind(('127.0.0.1', 7777))
unix.bind('/run/server.sock')
unix.listen()
client, local = socket.create_connection(('127.0.0.1', 7777)), socket.socket(1)
local.connect('/run/server.sock')
accepted, near = tcp.accept()[0], unix.accept()[0]
client.send(b'one')
waiting = socket.socket(1)      # its byte must be taken out of the kernel
waiting.connect('/run/server.sock')
waiting.send(b'1')
print('ready', flush=True)
with open('/run/server.ready', 'w') as file:
    file.write(str(os.getpid()))
request, number = b'', 0
while True:
    request, sender = datagrams.recvfrom(100)
    number += 1
    near.send(b'%d' % number)
    accepted.send(local.recv(100))
    print('round', number, flush=True)
    datagrams.sendto(client.recv(100) + accepted.recv(100, socket.MSG_PEEK), sender)
"""
ASK = """
import socket
with socket.socket(type=socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.sendto(b'?', ('127.0.0.1', 7777))
    print(sock.recv(100).decode())
"""


@pytest.mark.parametrize(('user', 'mode', 'frozen'), [('root', 'unit', True), ('root', 'cgroup', False),
                                                      ('nobody', 'unit', False)])
def test_a_server_comes_back(machine: Container, user: str, mode: str, frozen: bool) -> None:
    """It is dumped from within the daemon's sandbox, and is connected to the journal again. It is frozen again before
    its last data is taken, but not when it is stopped."""
    machine.run('install', '-d', '-m', '1777', '/run')
    machine.run('systemd-run', '--unit=server', f'--uid={user}', '--', '/usr/bin/python3', '-I', '-c', SERVER)
    ask = ('/usr/bin/python3', '-I', '-c', ASK)
    try:
        await_that('it serves', lambda: machine.run('cat', '/run/server.ready', check=False).stdout)
        pid = machine.output('cat', '/run/server.ready')
        assert machine.output(*ask) == '1one'
        if frozen:
            machine.run('systemctl', 'freeze', 'server.service')
        image = ctl(machine, 'checkpoint', 'server.service', '--kill', '--freeze', mode)['image']
        assert machine.property('server.service', 'LoadState') == 'not-found'       # and so it has not failed
        ctl(machine, 'restore', image)
        assert machine.output(*ask) == '2one'
        machine.run('journalctl', '--sync')
        assert 'round 2' in machine.output('journalctl', '-b', '--no-pager', '-o', 'cat')
    finally:
        machine.run('kill', '-KILL', pid, check=False)
        machine.run('systemctl', 'stop', 'server.service', check=False)
        machine.run('systemctl', 'reset-failed', 'server.service', check=False)
        machine.run('rm', '-f', '/run/server.ready', '/run/server.sock')

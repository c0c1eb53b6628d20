# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a restored tree is born: outside the daemon's sandbox, in a service that systemd starts for the one worker."""

import json
from typing import Any

import pytest

from tests.system.conftest import UID, as_user
from tests.system.container import ROOT, Container

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl')

# What the daemon does, in the daemon's own sandbox, with the installed worker: it waits for its Start meanwhile.
PROGRAM = """#!/usr/lib/ckptd/bin/python -I
import asyncio, json, os, signal, sys
from pathlib import Path
from ckptd.bus.client import connect
from ckptd.bus.systemd import Systemd
from ckptd.jobs.service import ServiceWorker

def picture(pid):
    rows = dict(row.split(':\\t', 1) for row in Path(f'/proc/{pid}/status').read_text().splitlines() if ':\\t' in row)
    return {'mnt': os.readlink(f'/proc/{pid}/ns/mnt'), 'pid': pid, 'command': Path(f'/proc/{pid}/cmdline').read_text(),
            'cgroup': Path(f'/proc/{pid}/cgroup').read_text().strip(), 'parent': rows['PPid'],
            **{name: rows[name] for name in ('Seccomp', 'NoNewPrivs', 'CapBnd', 'CapEff')}}

async def scope(client):
    sleeper = await asyncio.create_subprocess_exec('sleep', '1000')
    try:
        await Systemd(client).scope('ckptd-of-a-test.scope', [sleeper.pid], 'A tree')
        print(json.dumps(picture(sleeper.pid)))
    finally:
        sleeper.kill()
        await sleeper.wait()

async def main():
    async with await connect(sys.argv[2]) as client:
        if sys.argv[1] == 'scope':
            return await scope(client)
        worker = await ServiceWorker.start(Systemd(client), 'Birth of a worker')
        result = {'daemon': picture(os.getpid()), 'worker': picture(worker.pid)}
        if os.getuid() == 0:
            result['init'] = picture(1)
        if sys.argv[1] == 'kill':
            worker.kill()
            result['heard'] = await worker.receive()
        result['status'] = await worker.end(10)
        print(json.dumps(result))

asyncio.run(main())
"""


@pytest.fixture(scope='module')
def nursery(machine: Container) -> Container:
    """The machine with a service that has the daemon's sandbox and does only this."""
    unit = (ROOT / 'units/ckptd.service').read_text()
    unit = unit.replace('Type=notify', 'Type=oneshot\nStandardOutput=truncate:/run/birth-%i')
    unit = unit.replace('ExecStart=/usr/bin/ckptd --system', 'ExecStart=/usr/local/bin/birth %i system')
    lines = [line for line in unit.splitlines() if not line.startswith(('BusName=', 'Restart=', 'Watchdog', 'Alias=',
                                                                        'RuntimeDirectory'))]
    machine.path('/etc/systemd/system/birth@.service').write_text('\n'.join(lines))
    machine.path('/usr/local/bin/birth').write_text(PROGRAM)
    machine.run('chmod', '755', '/usr/local/bin/birth')
    machine.run('systemctl', 'daemon-reload')
    return machine


def born(machine: Container, how: str) -> dict[str, Any]:
    done = machine.run('systemctl', 'start', f'birth@{how}.service', check=False)
    assert done.returncode == 0, machine.journal(f'birth@{how}.service')
    return dict(json.loads(machine.output('cat', f'/run/birth-{how}')))


def test_a_worker_that_restores_is_under_nothing_of_the_daemon(nursery: Container) -> None:
    result = born(nursery, 'end')
    daemon, worker, init = result['daemon'], result['worker'], result['init']
    assert (daemon['Seccomp'], daemon['NoNewPrivs']) == ('2', '1')
    assert daemon['CapBnd'] != init['CapBnd']
    assert daemon['mnt'] != init['mnt']
    assert (worker['Seccomp'], worker['NoNewPrivs']) == ('0', '0')
    for name in ('CapBnd', 'CapEff', 'mnt'):
        assert worker[name] == init[name], name
    assert worker['parent'] == '1'
    assert 'ckptd.worker.main' in worker['command']
    assert '/ckptd-restore-' in worker['cgroup']
    assert result['status'] == 0


def test_its_death_is_heard_and_named(nursery: Container) -> None:
    result = born(nursery, 'kill')
    assert (result['heard'], result['status']) == (None, -9)


def test_a_scope_is_made_of_processes(nursery: Container) -> None:
    assert born(nursery, 'scope')['cgroup'].endswith('/system.slice/ckptd-of-a-test.scope')
    # it goes with its last process
    assert nursery.output('systemctl', 'list-units', '--plain', '--no-legend', 'ckptd-of-a-test.scope') == ''


@pytest.mark.needs('user-session')
def test_a_users_own_manager_does_the_same(nursery: Container, session: Container) -> None:
    result = json.loads(as_user(session, '/usr/local/bin/birth', 'kill', 'session').stdout)
    assert f'user@{UID}.service/app.slice/ckptd-restore-' in result['worker']['cgroup']
    assert result['worker']['parent'] not in (str(result['daemon']['pid']), '1')
    assert (result['heard'], result['status']) == (None, -9)


def test_nothing_of_it_stays(nursery: Container) -> None:
    born(nursery, 'end')
    listed = nursery.output('systemctl', 'list-units', '--all', '--plain', '--no-legend', 'ckptd-restore-*')
    assert listed == ''

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The harness itself: what the other tests here stand on."""

import subprocess
from pathlib import Path

import pytest

from tests.system.container import Container

pytestmark = pytest.mark.needs('systemd', 'unshare', 'busctl')


def test_systemd_is_pid_1_and_runs(machine: Container) -> None:
    assert machine.output('cat', '/proc/1/comm') == 'systemd'
    assert machine.output('systemctl', 'is-system-running') == 'running', machine.output('systemctl', '--failed')
    assert machine.output('systemctl', 'is-active', 'dbus.service') == 'active'


def test_cgroup2_only(machine: Container) -> None:
    kinds = [line.partition(' - ')[2].split()[0] for line in machine.output('cat', '/proc/self/mountinfo').splitlines()]
    assert kinds.count('cgroup2') == 1
    assert 'cgroup' not in kinds


def test_units_freeze(machine: Container) -> None:
    machine.run('systemd-run', '--unit=sleeper', 'sleep', '600')
    machine.run('systemctl', 'freeze', 'sleeper.service')
    assert machine.property('sleeper.service', 'FreezerState') == 'frozen'
    machine.run('systemctl', 'thaw', 'sleeper.service')
    machine.run('systemctl', 'stop', 'sleeper.service')


def test_host_is_out_of_reach(machine: Container) -> None:
    """Files go to the overlay and sysctls cannot be written."""
    machine.run('touch', '/etc/ckptd-was-here')
    assert not Path('/etc/ckptd-was-here').exists()
    done: subprocess.CompletedProcess[str] = machine.run('sh', '-c', 'echo 1 > /proc/sys/vm/swappiness', check=False)
    assert done.returncode != 0

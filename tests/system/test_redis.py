# SPDX-License-Identifier: LGPL-2.1-or-later
"""redis as its distribution runs it, under the filters of its unit; the unit's own namespaces are left out."""

from collections.abc import Callable

import pytest

from tests.system.container import Container
from tests.system.test_restored import no_image_left, picture
from tests.system.test_service import await_that, ctl

__all__ = ['no_image_left']     # a fixture

pytestmark = [pytest.mark.needs('systemd', 'unshare', 'busctl', 'redis'), pytest.mark.timeout(180)]


def test_redis_under_the_filters_of_its_unit(machine: Container, service: Callable[[str], str]) -> None:
    unit = service('redis-server.service')
    pid = int(machine.property(unit, 'MainPID'))
    before = picture(machine, pid)
    assert before['Seccomp'] == '2'
    assert int(before['Seccomp_filters']) >= 10
    assert machine.output('redis-cli', 'incr', 'rounds') == '1'
    by_its_user = machine.run('ckptctl', 'checkpoint', str(pid), user='redis', check=False)
    assert by_its_user.returncode == 3, by_its_user.stdout + by_its_user.stderr
    assert 'seccomp' in by_its_user.stderr
    assert ctl(machine, 'check', unit, '--as-root')['refusals'] == []
    target = unit
    for number in ('2', '3'):
        image = ctl(machine, 'checkpoint', target, '--kill', '--as-root')['image']
        machine.run('sh', '-c', f'while [ -e /proc/{pid} ]; do sleep 0.02; done')
        assert ctl(machine, 'restore', image)['root'] == pid
        await_that('redis answers', lambda: machine.output('redis-cli', 'get', 'rounds'))
        assert machine.output('redis-cli', 'incr', 'rounds') == number
        assert picture(machine, pid) == before
        target = str(pid)
    machine.run('kill', '-KILL', str(pid))

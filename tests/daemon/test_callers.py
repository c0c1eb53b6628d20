# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon of root's, called by somebody else: what the caller may do is what its uid may."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.bus import wire
from ckptd.bus.client import connect
from ckptd.bus.connection import Connection
from ckptd.bus.names import BUS_NAME, IMAGE, ROOT, image_path
from ckptd.bus.polkit import NAME as POLKIT
from ckptd.client import connect as ckptd_of
from ckptd.errors import Busy
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_link
from tests.daemon.test_api import Api
from tests.jobs.test_spool import write_image
from tests.lib.bus import PrivateBus, Served
from tests.programs.conftest import await_that
from tests.worker.driver import place_of

pytestmark = pytest.mark.needs('root', 'cgroup2', 'ptrace')

NOBODY = 65534
MANAGER, JOB = 'org.ckptd1.Manager', 'org.ckptd1.Job'


class Busctl:
    """busctl as some uid."""

    def __init__(self, bus: PrivateBus, uid: int) -> None:
        self._bus, self._uid = bus, uid

    def call(self, interface: str, member: str, *arguments: str, path: str = '/org/ckptd1') -> Any:
        """The values of the answer, or the words of the error."""
        done = subprocess.run(['busctl', f'--address={self._bus.address}', '--json=short', 'call', 'org.ckptd1', path,
                               interface, member, *arguments], capture_output=True, text=True, timeout=30, check=False,
                              user=self._uid, group=self._uid, extra_groups=[], cwd='/')
        if done.returncode:
            return done.stderr.strip()
        return json.loads(done.stdout)['data'] if done.stdout else None


@pytest.fixture
def images(tmp_path: Path) -> tuple[str, str]:
    """One of nobody's and one of another user's, there before the daemon is."""
    spool = tmp_path / 'spool'
    spool.mkdir(mode=0o700)
    return write_image(spool, NOBODY), write_image(spool, 1000)


@pytest.fixture
def nobody(private_bus: PrivateBus, on_bus: 'subprocess.Popen[bytes]') -> Busctl:
    return Busctl(private_bus, NOBODY)


@pytest.fixture
def root(private_bus: PrivateBus, on_bus: 'subprocess.Popen[bytes]') -> Busctl:
    return Busctl(private_bus, 0)


@contextlib.contextmanager
def sleeping(uid: int, directory: Path | None = None) -> Iterator['subprocess.Popen[bytes]']:
    """A process of that uid; with a directory it works there, and has a file of its own there to write to."""
    program = ['sh', '-c', 'exec sleep 1000 >output'] if directory else ['sleep', '1000']
    with subprocess.Popen(program, user=uid, group=uid, extra_groups=[], cwd=directory or '/', stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if directory:
            await_that('it sleeps', lambda: b'sleep' in Path(f'/proc/{process.pid}/cmdline').read_bytes()[:5])
        try:
            yield process
        finally:
            process.kill()


def test_ones_own_process(nobody: Busctl) -> None:
    with sleeping(NOBODY) as process:
        assert nobody.call(MANAGER, 'Freeze', 'sa{sv}', f'pid:{process.pid}', '0') == [1]
        assert nobody.call(MANAGER, 'Thaw', 'sa{sv}', f'pid:{process.pid}', '0') is None


async def test_polkit_that_answers_with_an_error(nobody: Busctl, private_bus: PrivateBus) -> None:
    """Who cannot tell does not let in, and says that it is worth another try."""
    async with await Connection.open(private_bus.address) as polkit:
        polkit.on_call = lambda call: polkit.send(wire.make_error(call, 'org.example.Busy', 's', ['not now']))
        await polkit.request_name(POLKIT)
        with sleeping(NOBODY) as process:
            answer = await asyncio.to_thread(nobody.call, MANAGER, 'Freeze', 'sa{sv}', f'pid:{process.pid}', '0')
    assert 'org.ckptd1.freeze-own: polkit does not answer' in answer
    await asyncio.get_running_loop().shutdown_default_executor()


def test_no_process_of_another(nobody: Busctl, root: Busctl) -> None:
    with sleeping(0) as process:
        target = f'pid:{process.pid}'
        assert 'org.ckptd1.freeze' in nobody.call(MANAGER, 'Freeze', 'sa{sv}', target, '0')
        untouched = nobody.call(MANAGER, 'Thaw', 'sa{sv}', target, '0')
        assert 'is not frozen by ckptd' in untouched
        assert root.call(MANAGER, 'Freeze', 'sa{sv}', target, '0') == [1]
        assert nobody.call(MANAGER, 'Thaw', 'sa{sv}', target, '0') == untouched
        assert root.call(MANAGER, 'Thaw', 'sa{sv}', target, '0') is None


async def test_which_job_of_anothers_is_busy_is_not_told(private_bus: PrivateBus, tmp_path: Path) -> None:
    """Nor that there is one, to who holds nothing that it works on."""
    config = tmp_path / 'ckptd.conf'
    config.write_text('[Daemon]\nInhibitDelayMaxSec=1h\n')
    nobody = Busctl(private_bus, NOBODY)
    with (sleeping(NOBODY) as process,
          Served(private_bus.address, tmp_path, tmp_path / 'spool', ('--config', str(config)))):
        target = f'pid:{process.pid}'
        async with ckptd_of(private_bus.address) as ckptd:
            with await ckptd.inhibit('a test', 'it looks meanwhile', target):
                assert await asyncio.to_thread(nobody.call, MANAGER, 'Freeze', 'sa{sv}', target, '0') == [1]
                job = await ckptd.checkpoint(target)
                for other in ('cgroup:/', 'pid:1'):
                    answer = await asyncio.to_thread(nobody.call, MANAGER, 'Thaw', 'sa{sv}', other, '0')
                    assert answer == f'Call failed: {other} is not frozen by ckptd'
                for method in ('Thaw', 'Freeze'):
                    answer = await asyncio.to_thread(nobody.call, MANAGER, method, 'sa{sv}', target, '0')
                    assert answer == 'Call failed: a job works on it'
                with pytest.raises(Busy, match=f'{job.id} works on {target}'):
                    await ckptd.thaw(target)
                await job.cancel()
            assert await asyncio.to_thread(nobody.call, MANAGER, 'Thaw', 'sa{sv}', target, '0') is None
    await asyncio.get_running_loop().shutdown_default_executor()


def test_ones_own_images_and_no_other(images: tuple[str, str], nobody: Busctl, root: Busctl, tmp_path: Path) -> None:
    mine, other = images
    for member in ('VerifyImage', 'RemoveImage'):
        assert f'uid {NOBODY} may not' in nobody.call(MANAGER, member, 's', other)
    for member in ('Restore', 'CheckRestore'):
        assert f'uid {NOBODY} may not restore' in nobody.call(MANAGER, member, 'sa{sv}', other, '0')
    assert root.call(MANAGER, 'ListJobs') == [[]]
    [damages] = nobody.call(MANAGER, 'VerifyImage', 's', mine)
    assert 'tree.img: 0 headers' in damages
    assert nobody.call(MANAGER, 'RemoveImage', 's', mine) is None
    assert root.call(MANAGER, 'RemoveImage', 's', other) is None
    assert list((tmp_path / 'spool').iterdir()) == []


def test_no_job_of_another(nobody: Busctl, root: Busctl) -> None:
    with sleeping(0) as process:
        [path] = root.call(MANAGER, 'Checkpoint', 'sa{sv}', f'pid:{process.pid}', '1', 'detach', 'b', 'true')
        assert 'no object at' in nobody.call(JOB, 'Cancel', 'a{sv}', '0', path=path)


async def test_the_image_belongs_to_the_caller(private_bus: PrivateBus, nobody: Busctl) -> None:
    with sleeping(NOBODY) as process:
        async with await connect(private_bus.address) as client, client.signals(BUS_NAME, ROOT) as signals:
            [job] = await asyncio.to_thread(nobody.call, MANAGER, 'Checkpoint', 'sa{sv}', f'pid:{process.pid}', '2',
                                            'after', 's', 'kill', 'detach', 'b', 'true')
            shown = await Api(client, signals).ended(job)
            assert shown['StartedByUID'] == NOBODY
            assert await client.property_(BUS_NAME, image_path(shown['Image']), IMAGE, 'Owner') == NOBODY
        assert process.wait(10) == -signal.SIGKILL
    await asyncio.get_running_loop().shutdown_default_executor()


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


async def restored_of(bus: PrivateBus, caller: Busctl, uid: int, directory: Path) -> int:
    """The root of a tree of that uid that was killed after its checkpoint and restored by the same caller."""
    with sleeping(uid, directory) as process:
        async with await connect(bus.address) as client, client.signals(BUS_NAME, ROOT) as signals:
            api = Api(client, signals)
            [job] = await asyncio.to_thread(caller.call, MANAGER, 'Checkpoint', 'sa{sv}', f'pid:{process.pid}', '2',
                                            'after', 's', 'kill', 'detach', 'b', 'true')
            image = (await api.ended(job))['Image']
            process.wait()
            [job] = await asyncio.to_thread(caller.call, MANAGER, 'Restore', 'sa{sv}', image, '1',
                                            'detach', 'b', 'true')
            shown = await api.ended(job)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert shown['State'] == 'done', shown['Error']
    return int(shown['Root'])


async def test_what_is_restored_has_the_rights_of_its_owner(private_bus: PrivateBus, nobody: Busctl) -> None:
    """No more of root's than before: ids, groups, capabilities; and its files are opened by the owner's rights."""
    with place_of(NOBODY) as home:
        pid = await restored_of(private_bus, nobody, NOBODY, home)
        try:
            status = read_status(pid)
            assert status.uids == status.gids == (NOBODY,) * 4
            assert set(status.groups) <= {NOBODY}      # of who asked, which busctl(1) was started with
            assert status.cap_inh == status.cap_prm == status.cap_eff == status.cap_amb == 0
            assert status.cap_bnd == read_status(os.getpid()).cap_bnd
            assert read_link(pid, 'fd/1') == str(home / 'output')
        finally:
            end(pid)


async def test_a_file_that_the_caller_may_no_more_open(private_bus: PrivateBus, nobody: Busctl) -> None:
    with place_of(NOBODY) as home, sleeping(NOBODY, home) as process:
        async with await connect(private_bus.address) as client, client.signals(BUS_NAME, ROOT) as signals:
            api = Api(client, signals)
            [job] = await asyncio.to_thread(nobody.call, MANAGER, 'Checkpoint', 'sa{sv}', f'pid:{process.pid}', '2',
                                            'after', 's', 'kill', 'detach', 'b', 'true')
            image = (await api.ended(job))['Image']
            process.wait()
            os.chown(home / 'output', 0, 0)
            (home / 'output').chmod(0o600)
            [job] = await asyncio.to_thread(nobody.call, MANAGER, 'Restore', 'sa{sv}', image, '1',
                                            'detach', 'b', 'true')
            shown = await api.ended(job)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert shown['State'] == 'failed'
    assert 'output' in shown['Error']['message']
    assert shown['Error']['errno'] in ('EACCES', 'EPERM')

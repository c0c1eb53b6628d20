# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names of unix sockets in a restart: taken by others, in directories that are gone, in images that lie."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import CkptError
from ckptd.image.records import SavedFile
from ckptd.objects.files.unix.names import SocketName
from ckptd.objects.files.unix.record import UnixSocketEnd
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.brood import Brood
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker, Place
from tests.worker.test_restore_checks import checked

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]


class Dead:
    """The image of the victim unix_names, which is dead."""

    def __init__(self, running: Victim, place: Place) -> None:
        self.place, self.victim = place, running
        self.image = place.checkpoint(running.pid, after='kill')
        running.process.wait()
        settled.reap_orphans()
        self.directory = running.directory

    def refusals(self) -> set[tuple[str, str]]:
        return {(row.errno, row.reason) for row in checked(self.place, self.image) if row.severity == 'refusal'}

    def restore(self) -> int:
        with DirectWorker() as worker:
            return int(worker.run(self.place.request(0, operation='restore', image=self.image.name))['root'])

    def lie(self, change: Callable[[SocketName], SocketName]) -> None:
        def changed(one: SavedFile) -> SavedFile:
            if one.kind != 'unix':
                return one
            end = UnixSocketEnd.decode(one.data)
            return replace(one, data=replace(end, name=change(end.name)).encode())
        rewrite(self.image, SavedFile, changed)


@pytest.fixture
def dead(victim: Callable[..., Victim], place: Place) -> Dead:
    return Dead(victim('unix_names'), place)


def test_stale_files_are_replaced(dead: Dead) -> None:
    assert dead.refusals() == set()
    before = {path.name for path in dead.directory.iterdir()}
    root = dead.restore()
    assert {path.name for path in dead.directory.iterdir()} == before
    dead.victim.go()
    assert os.waitpid(root, 0) == (root, 0), dead.victim.output


def test_missing_files_are_made(dead: Dead) -> None:
    for name in ('relative', 'path', 'bound', 'below/other', 'log', 'twice'):
        (dead.directory / name).unlink()
    root = dead.restore()
    dead.victim.go()
    assert os.waitpid(root, 0) == (root, 0), dead.victim.output


def test_what_stands_in_the_way_is_named(dead: Dead) -> None:
    """A FIFO, a directory that is gone, and living sockets with a path and with an abstract name."""
    for name in ('relative', 'log'):
        (dead.directory / name).unlink()
    os.mkfifo(dead.directory / 'relative')
    shutil.rmtree(dead.directory / 'below')
    with Brood() as brood, socket.socket(socket.AF_UNIX) as abstract:
        def bind() -> None:
            os.chdir(dead.directory)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.bind('log')
            sock.detach()
        pid = brood.fork(bind)
        abstract.bind(f'\0ckptd-names-{dead.victim.pid}')
        rows = dead.refusals()
        assert ('EADDRINUSE', 'log is in use by ' + Path(f'/proc/{pid}/comm').read_text().strip() + f'[{pid}]') in rows
        assert ('EADDRINUSE', f'@ckptd-names-{dead.victim.pid} is in use by '
                + Path('/proc/self/comm').read_text().strip() + f'[{os.getpid()}]') in rows
        assert any(errno == 'EEXIST' and f'{dead.directory}/relative' in reason for errno, reason in rows)
        assert any(errno == 'EACCES' and f'{dead.directory}/below/other' in reason for errno, reason in rows)
        with pytest.raises(CkptError):
            dead.restore()
        assert not dead.place.freezes


def test_a_name_that_is_taken_meanwhile(dead: Dead) -> None:
    """The plan finds nothing, and bind(2) does; all stale files are there again."""
    dead.lie(lambda name: replace(name, inode=0) if not name.is_path else name)
    before = {path: path.lstat().st_ino for path in dead.directory.rglob('*')}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken:
        taken.bind(f'\0ckptd-names-{dead.victim.pid}-log')
        with pytest.raises(CkptError):
            dead.restore()
    assert {path: path.lstat().st_ino for path in dead.directory.rglob('*')} == before


@pytest.mark.parametrize('name', [b'/nowhere/at/all', b'\0' * 108, b'/' * 200, b'relative'])
def test_names_that_lie(dead: Dead, name: bytes) -> None:
    before = {path: path.lstat().st_ino for path in dead.directory.rglob('*')}
    dead.lie(lambda one: replace(one, name=name) if one.name else one)
    with pytest.raises(CkptError):
        dead.restore()
    assert not dead.place.freezes
    assert {path: path.lstat().st_ino for path in dead.directory.rglob('*')} == before


@pytest.mark.needs('ip')
def test_ss_shows_the_same(victim: Callable[..., Victim], place: Place) -> None:
    """Names, peers and processes of all sockets; numbers of inodes differ."""
    shown = victim('unix_names')
    before = listed(shown.pid)
    assert before
    image = place.checkpoint(shown.pid, after='kill')
    shown.process.wait()
    settled.reap_orphans()
    with DirectWorker() as worker:
        root = int(worker.run(place.request(0, operation='restore', image=image.name))['root'])
    assert listed(root) == before
    shown.go()
    assert os.waitpid(root, 0) == (root, 0), shown.output


def listed(pid: int) -> list[str]:
    lines = subprocess.run(['ss', '-xapH'], capture_output=True, text=True, check=True).stdout.splitlines()
    mine = [re.sub(r'(?<=\s)\d+(?=\s)', 'N', line) for line in lines if f'pid={pid},' in line]
    return sorted(' '.join(line.split()) for line in mine)


@pytest.mark.parametrize('name', ['asyncio_unix', 'managers'])
def test_programs(place: Place, tmp_path: Path, name: str) -> None:
    """An asyncio program; and multiprocessing with a fork server, a manager and workers. Each is used after two
    restarts."""
    program = Path(__file__).parent / f'scripts/{name}.py'
    with Victim(name, directory=tmp_path / 'victim', program=program) as running:
        root = running.pid
        for _ in range(2):
            image = place.checkpoint(root, after='kill')
            if root == running.pid:
                running.process.wait()
            settled.reap_orphans()
            with DirectWorker() as worker:
                root = int(worker.run(place.request(0, operation='restore', image=image.name))['root'])
        running.go()
        assert os.waitpid(root, 0) == (root, 0), running.output

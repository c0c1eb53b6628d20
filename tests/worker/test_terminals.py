# SPDX-License-Identifier: LGPL-2.1-or-later
"""Terminals of a tree: data that waits in them, numbers that others have now, images that lie about them."""

import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import Busy, CkptError
from ckptd.image.reader import ImageReader
from ckptd.image.records import SavedFile
from ckptd.kernel import tty
from ckptd.objects.files.terminal.state import Unread
from ckptd.objects.files.terminal.tty import MASTER, SLAVE, Tty
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.lib.brood import fork
from tests.lib.forked import close_pytests_files
from tests.lib.victim import Victim, kill_session
from tests.programs.conftest import await_that
from tests.worker.driver import DirectWorker, Place
from tests.worker.test_restore import Generation
from tests.worker.test_restore_checks import checked

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]


@pytest.fixture
def generation(victim: Callable[..., Victim], place: Place) -> Iterator[Callable[..., Generation]]:
    made: list[Generation] = []

    def start(*args: str) -> Generation:
        made.append(Generation(place, victim('terminals', *args)))
        return made[-1]

    yield start
    for one in made:
        kill_session(one.victim.pid)
        settled.reap_orphans()


def terminals(image: Path) -> list[Tty]:
    with ImageReader(image) as reader:
        return [Tty.decode(saved.data) for saved in reader.every(SavedFile) if saved.kind == 'tty']


def lie(image: Path, change: Callable[[Tty], Tty]) -> None:
    rewrite(image, SavedFile, lambda one: one if one.kind != 'tty' else replace(
        one, data=change(Tty.decode(one.data)).encode()))


def verified(place: Place, image: Path) -> Any:
    with DirectWorker() as worker:
        return worker.run(place.request(0, operation='verify', image=image.name))['damages']


@pytest.mark.parametrize('generations', [1, 2])
def test_what_waits_is_kept_when_the_tree_is_killed(generation: Callable[..., Generation], generations: int) -> None:
    tree = generation('unread')
    for _ in range(generations):
        tree.restore(tree.kill())
    tree.finish()


def test_what_waits_stays_when_the_tree_goes_on(generation: Callable[..., Generation]) -> None:
    tree = generation('unread')
    with pytest.raises(Busy, match='has not been read yet') as caught:
        tree.place.checkpoint(tree.victim.pid)
    assert caught.value.exit_status == 75
    tree.victim.go()
    tree.victim.expect_success()


def test_a_number_that_another_terminal_has(generation: Callable[..., Generation], place: Place) -> None:
    """It gets another one, and a warning says so."""
    tree = generation('unread')
    image = tree.kill()
    numbers = {one.pty[0].pts for one in terminals(image) if one.pty}
    others: list[tuple[int, int]] = []
    try:
        while not all(Path(f'/dev/pts/{number}').exists() for number in numbers):
            others.append(pty.openpty())
        rows = checked(place, image)
        assert {row.severity for row in rows} == {'warning'}
        assert {row.reason for row in rows} == {f'/dev/pts/{number} is another terminal now' for number in numbers}
        tree.restore(image)
        tree.finish()
    finally:
        for pair in others:
            for fd in pair:
                os.close(fd)


LIES: dict[str, Callable[[Tty], Tty]] = {
    'settings': lambda one: replace(one, state=tuple(replace(state, settings=b'x') for state in one.state)),
    'locks': lambda one: replace(one, state=tuple(replace(state, locks=b'x' * 100) for state in one.state)),
    'no state': lambda one: replace(one, state=()) if one.pty else one,
    'no pty': lambda one: replace(one, pty=()) if one.side in (SLAVE, MASTER) else one,
    'number': lambda one: replace(one, pty=tuple(replace(pair, pts=1 << 31) for pair in one.pty)),
    'lines': lambda one: replace(one, unread=(Unread((), (), (1 << 31,), 0, 0),)) if one.side == MASTER else one,
    'many lines': lambda one: replace(one, unread=(Unread((), (), (0,) * 5000, 0, 0),)) if one.side == MASTER else one,
    'ptmx': lambda one: replace(one, pty=tuple(replace(pair, ptmx='/dev/null') for pair in one.pty)),
}


@pytest.mark.parametrize('name', LIES)
def test_lies_are_refused(generation: Callable[..., Generation], place: Place, name: str) -> None:
    """They leave nothing."""
    tree = generation()
    image = tree.kill()
    lie(image, LIES[name])
    with DirectWorker() as worker, pytest.raises(CkptError):
        worker.run(place.request(0, operation='restore', image=image.name))
    if name in ('settings', 'locks', 'number'):
        assert verified(place, image)


def test_sessions_of_others_get_no_terminal(generation: Callable[..., Generation], place: Place) -> None:
    """A record names the leader of its session; one that is not there is no harm."""
    tree = generation('unread')
    image = tree.kill()
    lie(image, lambda one: replace(one, state=tuple(replace(state, session=1, foreground=1) for state in one.state)))
    tree.restore(image)
    tree.finish()


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Path]:
    """A devpts file system of its own."""
    where = tmp_path / 'instance'
    where.mkdir()
    subprocess.run(['mount', '-t', 'devpts', '-o', 'newinstance,ptmxmode=0666,mode=620', 'devpts', where], check=True)
    yield where
    subprocess.run(['umount', where], check=True)


def test_a_file_system_of_its_own(place: Place, instance: Path) -> None:
    """Terminals of two file systems may have one number."""
    def work() -> None:
        masters = [os.open(path, os.O_RDWR | os.O_NOCTTY) for path in (instance / 'ptmx', instance / 'ptmx')]
        slaves = [tty.open_slave(master, os.O_RDWR) for master in masters if not tty.set_locked(master, False)]
        assert len(slaves) == 2
        signal.pause()

    pid = fork()
    if pid == 0:
        close_pytests_files()
        os.setsid()
        work()
    links = await_that('it has its terminals', lambda: found if len(found := links_of(pid, instance)) == 4 else None)
    image = place.checkpoint(pid, after='kill')
    os.waitpid(pid, 0)
    assert {one.pty[0].pts for one in terminals(image) if one.pty} == {0, 1}
    with DirectWorker() as worker:
        root = worker.run(place.request(0, operation='restore', image=image.name))['root']
    assert links_of(root, instance) == links
    os.kill(root, signal.SIGKILL)
    os.waitpid(root, 0)


def links_of(pid: int, below: Path) -> dict[str, str]:
    """The files of a process below a directory, by fd."""
    return {path.name: str(path.readlink()) for path in Path(f'/proc/{pid}/fd').iterdir()
            if str(path.readlink()).startswith(f'{below}/')}

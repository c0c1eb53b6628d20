# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a restore does to files, and by them: nothing that its user could not do."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.kernel.pidfd import wait_dead
from ckptd.kinds.locks import EOF, LEASE, Lock
from tests.lib import settled
from tests.lib.bus import Served
from tests.lib.fuse import FickleLink
from tests.security.attacker import PATIENCE, Attacker, Program, pidfd_of, refused, status, unchanged

# ---------------------------------------------------------------- a FIFO that is made again by its name

# It was opened by name and deleted, so a restore makes it again. What gets its mode is set-user-ID.
FIFO = """
os.mkfifo('fifo')
os.chmod('fifo', 0o6777)
fifo = os.open('fifo', os.O_RDWR)
os.unlink('fifo')
rest()
"""


class Window:
    """The moment between the birth of the FIFO and the next look at its path. `with` from when the program is dead.

    The way to the FIFO leads over a link, which leads where `act` says as soon as there is a FIFO.

        home/way        -> home/fuse/file -> home/real, and in that moment home/elsewhere
        home/real       the program's directory is in it
        home/elsewhere  a directory of the same name is in it, which is `elsewhere`

    taken: how often the path was looked at in that moment.
    """

    def __init__(self, attacker: Attacker, program: Program, act: 'Callable[[Window], Path]') -> None:
        self._way = program.directory.parent
        self._act = act
        self.real = attacker.home / 'real'
        self.fifo = self.real / program.directory.name / 'fifo'
        self.elsewhere = attacker.own(attacker.own(attacker.home / 'elsewhere') / program.directory.name)
        self._link = FickleLink(attacker.home / 'fuse', self._lead)
        self.taken = 0

    def _lead(self) -> Path:
        if not self.fifo.is_fifo():
            return self.real
        self.taken += 1
        return self._act(self)

    def __enter__(self) -> 'Window':
        self._link.__enter__()
        self._way.rename(self.real)
        self._way.symlink_to(self._link.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._link.__exit__()


def swap(window: Window) -> Path:
    """The user exchanges the FIFO for what is in `elsewhere`."""
    return window.elsewhere.parent


def link(window: Window) -> Path:
    """The user gives the FIFO a second name."""
    name = window.fifo.with_name('name')
    if not name.is_fifo():
        name.hardlink_to(window.fifo)
    return window.real


@pytest.fixture
def program(attacker: Attacker) -> Program:
    """One with the FIFO, in a directory of a directory of the user's."""
    attacker.own(attacker.home / 'way')
    return attacker.start(FIFO, 'way/program')


@pytest.mark.needs('fuse')
def test_a_fifo_is_swapped_for_a_program(served: Served, attacker: Attacker, program: Program) -> None:
    """The imported image says that the FIFO was root's. What is in its place would become root's, with set-user-ID."""
    image = attacker.take(program)
    assert image.alter_kind('fifo', lambda file: file.mode & 0o6000, uid=0, gid=0) == 1
    shell = attacker.own(attacker.home / 'shell', b'#!/bin/sh\nid\n')
    with Window(attacker, program, swap) as window, unchanged(shell):
        (window.elsewhere / 'fifo').hardlink_to(shell)
        attacker.restore(image)
    assert window.taken


@pytest.mark.needs('fuse')
def test_a_fifo_is_swapped_for_a_file_of_root(served: Served, attacker: Attacker, program: Program) -> None:
    """Without an import: the FIFO was the user's. A file of root that everybody may write would become the user's."""
    image = attacker.checkpoint(program)
    log = attacker.home.parent / 'log'
    log.write_bytes(b'of root')
    log.chmod(0o666)
    with Window(attacker, program, swap) as window, unchanged(log):
        (window.elsewhere / 'fifo').hardlink_to(log)
        attacker.restore(image)
    assert window.taken


@pytest.mark.needs('fuse')
def test_a_fifo_gets_a_second_name(served: Served, attacker: Attacker, program: Program) -> None:
    """A FIFO of root's, in a directory of the user's, that everybody may write."""
    image = attacker.take(program)
    assert image.alter_kind('fifo', lambda file: file.mode & 0o6000, uid=0, gid=0) == 1
    with Window(attacker, program, link) as window:
        attacker.restore(image)
    assert window.taken
    assert window.fifo.with_name('name').stat().st_uid == attacker.uid


# ---------------------------------------------------------------- owners of signals

SLEEPER = """
#include <unistd.h>
int main(void) { return setresgid(0, 0, 0) || setresuid(0, 0, 0) || write(1, "!", 1) != 1 || pause(); }
"""
# data in the pipe sends SIGKILL to the process group: F_SETSIG, F_SETOWN_EX with F_OWNER_PGRP, <linux/fcntl.h>
SIGNALLED = """
read, write = os.pipe()
fcntl.fcntl(read, 10, 9)
fcntl.fcntl(read, 15, struct.pack('ii', 2, os.getpgrp()))
fcntl.fcntl(read, fcntl.F_SETFL, fcntl.fcntl(read, fcntl.F_GETFL) | os.O_ASYNC)
ready()
wait_for_go()
begun, theirs = os.pipe()
pid = os.posix_spawn({0!r}, [{0!r}], {{}}, file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 1)])
os.read(begun, 1)
say(pid)
wait_for_go()
os.write(write, b'!')
time.sleep(1000)
"""


@pytest.fixture
def sleeper(attacker: Attacker) -> Path:
    """A program with set-user-ID that is root's in every respect once it runs."""
    path = attacker.home.parent / 'sleeper'
    subprocess.run(['gcc', '-x', 'c', '-o', path, '-'], input=SLEEPER, text=True, check=True)
    path.chmod(0o4755)
    return path


@pytest.mark.needs('gcc', 'set-user-ID')
@pytest.mark.parametrize('claimed', [True, False], ids=['roots', 'own'])
def test_whose_signals_a_file_sends(served: Served, attacker: Attacker, sleeper: Path, claimed: bool) -> None:
    """A process of root in the user's process group gets no SIGKILL from a pipe whose image says it is root's."""
    program = attacker.start(SIGNALLED.format(str(sleeper)))
    image = attacker.take(program)
    if claimed:
        assert image.alter('OpenFile', lambda file: file.owner_signal, owner_uid=0, owner_euid=0) == 1
    outcome = attacker.restore(image)
    if claimed and refused(outcome):
        return
    assert outcome.root, outcome.words
    roots = int(program.ask())
    assert status(roots)['Uid'].split() == ['0'] * 4
    with pidfd_of(outcome.root) as dead:
        program.go()
        assert wait_dead(dead, PATIENCE)
    # the signal was sent to all of the group before one of them could die of it
    assert not settled.is_zombie(roots)
    assert not int(status(roots)['ShdPnd'], 16) & 1 << signal.SIGKILL - 1


# ---------------------------------------------------------------- leases

@pytest.mark.parametrize('write', [0, 1], ids=['read', 'write'])
def test_no_lease_on_a_file_of_root(served: Served, attacker: Attacker, write: int) -> None:
    """Whoever opens a leased file for writing waits 45 s. A lease takes the file's owner, fcntl(2)."""
    file = attacker.home.parent / 'file'
    file.touch(0o644)
    program = attacker.start(f'file = open({str(file)!r})\nrest()')
    image = attacker.take(program)
    lease = Lock(LEASE, write, 0, EOF, 0)
    assert image.alter_kind('regular', lambda one: one.link == str(file), locks=(lease,)) == 1
    refused(attacker.restore(image))
    os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))     # EAGAIN where it is leased


# ---------------------------------------------------------------- /proc/self

READER = "file = open('/etc/passwd')\nrest()"
# link, what it leads to; the path of the image
WAYS = {
    'maps': ('', '', '/proc/self/maps'),
    'mem': ('', '', '/proc/self/mem'),
    'thread': ('', '', '/proc/thread-self/maps'),
    'dot': ('', '', '/proc/./self/maps'),
    'link': ('link', '/proc/self/maps', 'link'),
    'directory': ('link', '/proc/self', 'link/maps'),
    'fds': ('link', '/proc/self/fdinfo', 'link/0'),
}


def belongs_to(pid: int) -> set[int]:
    """Processes whose files of /proc a process has open, or works in."""
    places = [*Path(f'/proc/{pid}/fd').iterdir(), Path(f'/proc/{pid}/cwd'), Path(f'/proc/{pid}/root')]
    return {int(match[1]) for place in places if (match := re.match(r'/proc/(\d+)', str(place.readlink())))}


def lead(attacker: Attacker, way: str) -> str:
    """The path of the image, after the user has made the links in it."""
    name, goal, path = WAYS[way]
    if name:
        (attacker.home / name).symlink_to(goal)
    return str(attacker.home / path)


@pytest.mark.parametrize('way', WAYS)
def test_self_is_nobody_else(served: Served, attacker: Attacker, way: str) -> None:
    """Who opens it for the tree is another process, with other rights than the tree's."""
    image = attacker.take(attacker.start(READER))
    path = lead(attacker, way)
    assert image.alter_kind('regular', lambda one: one.link == '/etc/passwd', path=path) == 1
    outcome = attacker.restore(image, changed_files='accept')
    if not refused(outcome):
        assert belongs_to(outcome.root) <= {outcome.root}


@pytest.mark.parametrize('way', ['/proc/self', '/proc/self/fd', 'link'])
def test_no_working_directory_in_it(served: Served, attacker: Attacker, way: str) -> None:
    image = attacker.take(attacker.start('rest()'))
    (attacker.home / 'link').symlink_to('/proc/self')
    assert image.alter('Fs', cwd=str(attacker.home / way))
    outcome = attacker.restore(image)
    if not refused(outcome):
        assert belongs_to(outcome.root) <= {outcome.root}

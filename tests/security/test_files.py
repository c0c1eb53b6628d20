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
from ckptd.objects.files.locks import EOF, LEASE, Lock
from tests.lib import settled
from tests.lib.bus import Served
from tests.lib.imgedit import ImageStream
from tests.lib.stepping import at_each_call
from tests.security.attacker import PATIENCE, Attacker, Program, pidfd_of, refused, standing, status, unchanged
from tests.worker.faulty import Gate

# ---------------------------------------------------------------- a FIFO that is made again by its name

# It was opened by name and deleted, so a restore makes it again. What gets its mode is set-user-ID.
FIFO = """
os.mkfifo('fifo')
os.chmod('fifo', 0o6777)
fifo = os.open('fifo', os.O_RDWR)
os.unlink('fifo')
rest()
"""


@pytest.fixture
def program(attacker: Attacker) -> Program:
    """One with the FIFO, in a directory of the user's."""
    return attacker.start(FIFO)


@pytest.fixture
def asking(serve: Callable[..., Served], gate: Gate) -> Served:
    """A daemon whose restores wait before they open anything."""
    return serve(env={**gate.environment, 'CKPTD_FAULT': 'planned=ask'})


async def restored_with(gate: Gate, attacker: Attacker, image: str | ImageStream, act: Callable[[], bool]) -> None:
    """Restore an image, and have `act` done between two system calls of the worker, until it says that it is done."""
    done = False

    def look() -> None:
        nonlocal done
        done = done or act()

    with attacker.restoring(image) as call:
        with await standing(gate, 'planned', call) as stands:
            assert at_each_call(stands.pid, look, stands.answer)
        await call
    assert done, 'there was no FIFO by a name'


def swapped(fifo: Path, target: Path) -> Callable[[], bool]:
    """The user puts another file in the place of the FIFO, as soon as that is there."""
    other = fifo.with_name('other')
    other.hardlink_to(target)

    def act() -> bool:
        if not fifo.is_fifo():
            return False
        other.rename(fifo)
        return True
    return act


@pytest.mark.needs('ptrace')
async def test_a_fifo_is_swapped_for_a_program(asking: Served, gate: Gate, attacker: Attacker,
                                               program: Program) -> None:
    """The imported image says that the FIFO was root's. What is in its place would become root's, with set-user-ID."""
    image = attacker.take(program)
    assert image.alter_kind('fifo', lambda file: file.mode & 0o6000, uid=0, gid=0) == 1
    shell = attacker.own(attacker.home / 'shell', b'#!/bin/sh\nid\n')
    with unchanged(shell):
        await restored_with(gate, attacker, image, swapped(program.directory / 'fifo', shell))


@pytest.mark.needs('ptrace')
async def test_a_fifo_is_swapped_for_a_file_of_root(asking: Served, gate: Gate, attacker: Attacker,
                                                    program: Program) -> None:
    """Without an import: the FIFO was the user's. A file of root that everybody may write would become the user's."""
    image = attacker.checkpoint(program)
    log = attacker.home.parent / 'log'
    log.write_bytes(b'of root')
    log.chmod(0o666)
    with unchanged(log):
        await restored_with(gate, attacker, image, swapped(program.directory / 'fifo', log))


@pytest.mark.needs('ptrace')
async def test_a_fifo_gets_a_second_name(asking: Served, gate: Gate, attacker: Attacker,
                                         program: Program) -> None:
    """A FIFO of root's, in a directory of the user's, that everybody may write."""
    image = attacker.take(program)
    assert image.alter_kind('fifo', lambda file: file.mode & 0o6000, uid=0, gid=0) == 1
    fifo = program.directory / 'fifo'

    def link() -> bool:
        if not fifo.is_fifo():
            return False
        fifo.with_name('name').hardlink_to(fifo)
        return True

    await restored_with(gate, attacker, image, link)
    found = fifo.with_name('name').stat()
    assert (found.st_uid, found.st_mode & 0o6000) == (attacker.uid, 0)


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
        assert image.alter('SavedFile', lambda file: file.owner_signal, owner_uid=0, owner_euid=0) == 1
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

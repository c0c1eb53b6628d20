# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers with their clients in one tree: used, checkpointed, used, killed, restored, used; and once again."""

import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lib import settled
from tests.lib.network import own_network
from tests.lib.victim import session_members
from tests.programs.conftest import WORK, Restored, Standalone
from tests.programs.test_programs import Program

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'root', 'ip'), pytest.mark.timeout(240)]
PORT = '7000'
# of work/served, by what the gate calls the program
OF_OTHERS = {'java': 'web.Java', 'mariadb': 'databases.Mariadb', 'memcached': 'databases.Memcached',
             'mosquitto': 'databases.Mosquitto', 'nginx': 'web.Nginx', 'node': 'web.Node',
             'postgres': 'databases.Postgres', 'redis': 'databases.Redis'}
SERVERS = [pytest.param('agents.Session', id='session',
                        marks=pytest.mark.needs('curl', 'gpg', 'inotifywait', 'rsync', 'ssh')),
           *(pytest.param(name, id=name) for name in ('python.Asyncio', 'python.Multiprocessing')),
           *(pytest.param(name, id=program, marks=pytest.mark.needs(program)) for program, name in OF_OTHERS.items())]


@pytest.fixture
def network() -> Iterator[None]:
    """Ports that nobody else takes while the tree is dead."""
    with own_network():
        yield


@contextmanager
def talk(directory: Path, restored: Restored | None = None) -> Iterator[Callable[[], int]]:
    """Use the server once: the number of the round. Open for reading as well, the FIFOs need no other process."""
    with (directory / 'ask').open('r+b', buffering=0) as ask, (directory / 'answer').open('r+b', buffering=0) as answer:
        def use() -> int:
            ask.write(b'!')
            if restored:
                restored.await_that('an answer', lambda: select.select([answer], [], [], 0)[0])
            return said(answer.fileno())
        yield use


def said(fd: int, seconds: float = 100) -> int:
    assert select.select([fd], [], [], seconds)[0], 'no answer'
    line = os.read(fd, 8192).decode()
    assert line.strip().isdecimal(), line
    return int(line)


@pytest.mark.usefixtures('network')
@pytest.mark.parametrize('name', SERVERS)
def test_server_with_its_client(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    live_on(program, standalone, tmp_path, name, sys.executable)


def live_on(program: Program, standalone: Standalone, tmp_path: Path, name: str, python: str | Path) -> None:
    """Start a server of work/served by an interpreter, and use it in each of its lives."""
    open_to_all(tmp_path)
    process = program(python, '-I', WORK / 'served', name, PORT)
    wait_for(tmp_path / 'answer')
    with talk(tmp_path) as use:
        assert use() == 1
        standalone('check', str(process.pid))
        standalone('checkpoint', str(process.pid))
        assert use() == 2
        first = standalone.checkpoint_and_kill(process)
    with standalone.restore(first['image']) as restored, talk(tmp_path, restored) as use:
        assert use() == 3
        second = standalone('checkpoint', str(process.pid), '--kill')
        restored.await_end()
    settled.reap_orphans()
    assert not session_members(process.pid)
    with standalone.restore(second['image']) as restored, talk(tmp_path, restored) as use:
        assert [use(), use()] == [4, 5]


def open_to_all(directory: Path) -> None:
    """Let a server that runs as another user reach its files."""
    for one in (directory, *directory.parents):
        if not one.stat().st_mode & 0o1:
            one.chmod(0o711)


def wait_for(fifo: Path) -> None:
    """The program says 0 when it is ready."""
    while not fifo.exists():
        os.sched_yield()
    fd = os.open(fifo, os.O_RDWR)
    try:
        assert said(fd) == 0
    finally:
        os.close(fd)

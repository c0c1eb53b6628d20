# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers with their clients in one tree: used, checkpointed, used, killed, restored, used; and once again."""

import os
import select
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lib import settled
from tests.lib.victim import session_members
from tests.programs.conftest import WORK, Restored, Standalone
from tests.programs.test_programs import Program

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'root'), pytest.mark.timeout(240)]
# of work/served, by what the gate calls the program
OF_OTHERS = {'java': 'web.Java', 'mariadb': 'databases.Mariadb', 'memcached': 'databases.Memcached',
             'mosquitto': 'databases.Mosquitto', 'nginx': 'web.Nginx', 'node': 'web.Node',
             'postgres': 'databases.Postgres', 'redis': 'databases.Redis'}
SERVERS = [*(pytest.param(name, id=name) for name in ('python.Asyncio', 'python.Manager')),
           *(pytest.param(name, id=program, marks=pytest.mark.needs(program)) for program, name in OF_OTHERS.items())]


def free_port() -> int:
    """A port below those that the kernel gives to others."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(('127.0.0.1', port))
            except OSError:
                continue
            return port
    raise AssertionError('no free port')


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


@pytest.mark.parametrize('name', SERVERS)
def test_server_with_its_client(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o711)      # for a server that runs as another user
    process = program(sys.executable, '-I', WORK / 'served', name, str(free_port()))
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


def wait_for(fifo: Path) -> None:
    """The program says 0 when it is ready."""
    while not fifo.exists():
        os.sched_yield()
    fd = os.open(fifo, os.O_RDWR)
    try:
        assert said(fd) == 0
    finally:
        os.close(fd)

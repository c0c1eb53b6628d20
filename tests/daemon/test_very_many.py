# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees of which there is more to say than one message holds."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.client import Ckptd
from ckptd.errors import Refused
from ckptd.protocol.channel import MAX_ROW
from ckptd.protocol.messages import MAX_ROWS

pytestmark = pytest.mark.needs('dbus', 'ptrace')

SOCKETS = 1000
LONG = 180          # characters of a name


@contextmanager
def running(code: str) -> Iterator[str]:
    """The target of a program that has run this, which leaves 1000 fds open, and waits."""
    program = ('import resource, os, socket, signal\n'
               'resource.setrlimit(resource.RLIMIT_NOFILE, [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2)\n'
               f'{code}\nprint("up", flush=True)\nsignal.pause()\n')
    with subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b'up\n'
            yield f'pid:{process.pid}'
        finally:
            process.kill()


async def test_refusals(ckptd: Ckptd) -> None:
    """A check has all, an error the first of them, on whatever way it comes, and how many there are."""
    with socket.create_server(('127.0.0.1', 0), backlog=SOCKETS) as server, running(
            f'kept = [socket.create_connection({server.getsockname()!r}) for _ in range({SOCKETS})]') as target:
        sockets = [row for row in await ckptd.check(target) if row.severity == 'refusal']
        assert len(sockets) >= SOCKETS
        job = await ckptd.checkpoint(target)
        for _ in range(2):      # from the signals, from the property
            with pytest.raises(Refused) as caught:
                await job.wait()
            assert list(caught.value.refusals) == sockets[:MAX_ROWS]
            assert f'(and {len(sockets) - 1} more)' in caught.value.message


async def test_open_files_of_long_names(ckptd: Ckptd, tmp_path: Path) -> None:
    """Of those of a process as many are shown as fit."""
    name = tmp_path / ('x' * LONG)
    name.touch()
    with running(f'kept = [os.open({str(name)!r}, os.O_RDONLY) for _ in range(1000)]') as target:
        [task] = await ckptd.scan(target)
        shown = [fd for fd in task.fds if fd.endswith(str(name))]
        assert MAX_ROW // 2 // (len(str(name)) + 10) <= len(shown) < 1000
        assert [int(fd.split()[0]) for fd in task.fds] == list(range(len(task.fds)))

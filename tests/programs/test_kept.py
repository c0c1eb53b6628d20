# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers whose client is outside of the tree, over a veth: it sees a pause and no error when its server is killed and
restored, twice."""

import os
import pwd
import select
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lib import settled
from tests.programs.conftest import Standalone, await_that
from tests.programs.test_programs import Program
from tests.programs.test_servers import open_to_all
from tests.worker.test_tcp_keep import OURS, other_net

__all__ = ['other_net']     # a fixture

pytestmark = [pytest.mark.needs('dbus', 'root', 'ptrace', 'ip', 'unshare'), pytest.mark.timeout(240)]
HOST, PORT = OURS[socket.AF_INET], 7070
# the worker for the tree of a user, as that of postgres, has their rights else
KEEP = ('--external', 'any:keep', '--as-root')


class Kept(ABC):
    """A server, and the command of a client that reads lines."""

    client: tuple[str | Path, ...]
    ready: tuple[str | Path, ...]       # another one, which succeeds as soon as the server answers

    @abstractmethod
    def start(self, program: Program) -> 'subprocess.Popen[bytes]': ...

    @abstractmethod
    def line(self, number: int) -> tuple[str, str]:
        """What the client is told in a round, and what it answers."""


class Redis(Kept):
    client = ('redis-cli', '-h', HOST, '-p', str(PORT))
    ready = (*client, 'ping')

    def start(self, program: Program) -> 'subprocess.Popen[bytes]':
        return program('redis-server', '--bind', HOST, '--port', str(PORT), '--protected-mode', 'no', '--save', '')

    def line(self, number: int) -> tuple[str, str]:
        return 'incr rounds', str(number)


class Postgres(Kept):
    """A session in a transaction."""

    def __init__(self) -> None:
        self.programs = max(Path('/usr/lib/postgresql').glob('*/bin'))
        self.client = (self.programs / 'psql', '-XqAt', '-U', 'postgres', '-h', HOST, '-p', str(PORT), 'postgres')
        self.ready = (*self.client, '-c', 'select 1')

    def start(self, program: Program) -> 'subprocess.Popen[bytes]':
        user = pwd.getpwnam('postgres')
        drop = ['setpriv', f'--reuid={user.pw_uid}', f'--regid={user.pw_gid}', '--clear-groups']
        data = Path('data').absolute()
        open_to_all(data.parent)
        data.mkdir()
        os.chown(data, user.pw_uid, user.pw_gid)
        subprocess.run([*drop, self.programs / 'initdb', '-D', data, '-A', 'trust', '-N', '--no-instructions'],
                       stdout=subprocess.DEVNULL, check=True)
        with (data / 'pg_hba.conf').open('a') as rules:
            rules.write(f'host all all {HOST}/24 trust\n')
        return program(*drop, self.programs / 'postgres', '-D', data, '-p', str(PORT), '-c', 'unix_socket_directories=',
                       '-c', f'listen_addresses={HOST}')

    def line(self, number: int) -> tuple[str, str]:
        if number == 1:
            return 'create table t(n int); begin; insert into t values (1); select count(*) from t;', '1'
        return f'insert into t values ({number}); select count(*) from t;', str(number)


@pytest.mark.parametrize('kind', [
    pytest.param(Redis, marks=pytest.mark.needs('redis')), pytest.param(Postgres, marks=pytest.mark.needs('postgres'))])
def test_a_client_outside_sees_a_pause(other_net: int, program: Program, standalone: Standalone, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch, kind: Callable[[], Kept]) -> None:
    monkeypatch.chdir(tmp_path)
    kept = kind()
    server = kept.start(program)
    outside = ['nsenter', '-t', str(other_net), '-n']
    await_that('the server answers', lambda: subprocess.run([*outside, *kept.ready], check=False,
                                                            capture_output=True).returncode == 0)
    command = [*outside, *kept.client]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client, ExitStack() as stack:
        stack.callback(client.kill)
        assert client.stdin
        stdin = client.stdin

        def tell(number: int) -> None:
            stdin.write(f'{kept.line(number)[0]}\n'.encode())
            stdin.flush()

        tell(1)
        assert answer(client) == kept.line(1)[1]
        image = standalone.checkpoint_and_kill(server, *KEEP)['image']
        tell(2)     # to nobody
        with standalone.restore(image) as restored:
            restored.await_that('an answer', lambda: answers(client))
            assert answer(client) == kept.line(2)[1]
            tell(3)
            assert answer(client) == kept.line(3)[1]
            image = standalone('checkpoint', str(server.pid), '--kill', *KEEP)['image']
            restored.await_end()
        settled.reap_orphans()
        with standalone.restore(image) as restored:
            tell(4)
            restored.await_that('an answer', lambda: answers(client))
            assert answer(client) == kept.line(4)[1]
            client.stdin.close()
            assert client.wait(20) == 0


def answers(client: 'subprocess.Popen[bytes]') -> bool:
    return bool(select.select([client.stdout], [], [], 0)[0])


def answer(client: 'subprocess.Popen[bytes]') -> str:
    assert client.stdout
    return client.stdout.readline().decode().strip()

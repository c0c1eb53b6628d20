# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl --external and --inherit, External= of ckptd.conf: a client in the tree, whose server is outside of it."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Ctl
from tests.cli.test_restored import dumped
from tests.lib.bus import Daemon, read_line

pytestmark = pytest.mark.needs('dbus', 'ptrace', 'root')

# with the exit status that it was sent, 9 at end-of-file
CLIENT = """
import socket, sys
with socket.socket(socket.AF_UNIX) as client:
    client.connect('\\0' + sys.argv[1])
    client.send(b'ready')
    sys.exit(int(client.recv(100) or b'9'))
"""
NAME = f'ckptd-test-{os.getpid()}'


class Server:
    """The server, with one client that runs."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.client = subprocess.Popen(['/usr/bin/python3', '-I', '-S', '-c', CLIENT, NAME], stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self.connection = listener.accept()[0]
        assert self.connection.recv(100) == b'ready'

    def finish(self, process: 'subprocess.Popen[str]', status: int) -> None:
        """Expect this exit status of restore --wait."""
        _, err = process.communicate(timeout=30)
        assert process.returncode == status, err


@pytest.fixture
def server() -> Iterator[Server]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'\0{NAME}')
        listener.listen()
        running = Server(listener)
        with running.connection, running.client:
            yield running
            running.client.kill()


@pytest.mark.parametrize('how', ['standalone', 'ctl'])
def test_a_socket_of_the_caller(how: str, server: Server, request: pytest.FixtureRequest) -> None:
    """And ckptctl itself does not keep it: the server reads end-of-file when the tree has ended."""
    ctl: Ctl = request.getfixturevalue(how)
    image = dumped(ctl, server.client, '--external', f'@{NAME}:inherit')
    dry = ctl('restore', image, '--dry-run')
    assert (dry.status, f'--inherit @{NAME}=FD' in dry.out) == (3, True), dry.out + dry.err
    with socket.socket(socket.AF_UNIX) as mine:
        mine.connect(f'\0{NAME}')
        process = ctl.start('restore', image, '--wait', '--inherit', f'@{NAME}={mine.fileno()}',
                            pass_fds=[mine.fileno()])
    with server.listener.accept()[0] as connection:
        assert process.stderr is not None
        assert 'its root is process' in read_line(process.stderr.fileno(), 30)
        connection.send(b'42')
        assert connection.recv(100) == b''
        server.finish(process, 42)


def test_what_cannot_be_inherited(ctl: Ctl) -> None:
    for text, words in (('any', 'is not WHAT=FD'), ('x=0', 'is no peer'), ('any=999', 'descriptor 999 is not open')):
        done = ctl('restore', 'image', '--inherit', text)
        assert (done.status, words in done.err) == (2, True), done.err
    done = ctl('restore', 'image', '--inherit', 'any=0')
    assert 'option "inherit" must be up to 15 pairs (WHAT, file descriptor of a socket or pipe)' in done.err


def test_a_closed_connection(ctl: Ctl, server: Server) -> None:
    image = dumped(ctl, server.client, '--external', 'any:close')
    server.finish(ctl.start('restore', image, '--wait'), 9)


def test_the_configuration(start_daemon: Callable[..., Daemon], tmp_path: Path, server: Server) -> None:
    """An option of the call comes behind it. Without a policy the checkpoint is refused, and names the peer."""
    config = tmp_path / 'ckptd.conf'
    config.write_text(f'[Manager]\nExternal="@{NAME}:reconnect"\n')
    ctl = Ctl('--address', start_daemon('--config', str(config)).address)
    refused = ctl('check', str(server.client.pid), '--external', f'@{NAME}:refuse')
    assert refused.status == 3
    assert f'[{os.getpid()}]' in refused.out
    assert f'@{NAME}' in refused.out
    image = dumped(ctl, server.client)
    process = ctl.start('restore', image, '--wait')
    with server.listener.accept()[0] as connection:
        connection.send(b'44')
        server.finish(process, 44)

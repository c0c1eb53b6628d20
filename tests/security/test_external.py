# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connections of a user's tree to the outside, through root's daemon: each policy gives the user what is the user's."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lib.bus import Served
from tests.security.attacker import Attacker, Program

NAME = f'ckptd-test-{os.getpid()}'
CLIENT = f"""
import socket
client = socket.socket(socket.AF_UNIX)
client.connect('\\0{NAME}')
ready()
wait_for_go()
say(client.recv(100).decode() or 'end-of-file')
"""


@contextmanager
def client_of(user: Attacker) -> Iterator[tuple[socket.socket, Program]]:
    """A listener of this process, and a program that is connected to it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f'\0{NAME}')
        listener.listen()
        program = user.start(CLIENT)
        with listener.accept()[0]:
            yield listener, program


def test_a_socket_of_the_caller(served: Served, attacker: Attacker) -> None:
    """Without it, or with another kind of file, the restore is refused. The worker that waits does not keep it."""
    with client_of(attacker) as (listener, program):
        image = attacker.checkpoint(program, external=[f'@{NAME}:inherit'])
        refused = attacker.restore(image)
        assert refused.error is not None
        assert f'--inherit @{NAME}=FD' in refused.error.refusals[0].hint
        with socket.socket(socket.AF_UNIX) as mine:
            refused = attacker.restore(image, inherit=[(f'@{NAME}', mine.fileno())])
            assert 'a socket without a connection' in refused.words
            mine.connect(f'\0{NAME}')
            back = attacker.restore(image, inherit=[(f'@{NAME}', mine.fileno())])
            assert back.root == program.pid, back.words
        with listener.accept()[0] as connection:
            connection.send(b'of the caller')
            assert program.ask() == 'of the caller'
            assert connection.recv(100) == b''


def test_a_new_connection_and_a_closed_one(serve: Callable[..., Served], attacker: Attacker, tmp_path: Path) -> None:
    """The daemon's configuration holds for users, too; what the call says comes after it."""
    config = tmp_path / 'ckptd.conf'
    config.write_text('[Manager]\nExternal=any:close\n')
    serve('--config', str(config))
    with client_of(attacker) as (_, program):
        image = attacker.checkpoint(program)
        assert attacker.restore(image).root == program.pid
        assert program.ask() == 'end-of-file'
    with client_of(attacker) as (listener, program):
        image = attacker.checkpoint(program, external=[f'@{NAME}:reconnect'])
        back = attacker.restore(image)
        assert back.root == program.pid, back.words
        with listener.accept()[0] as connection:
            connection.send(b'again')
            assert program.ask() == 'again'

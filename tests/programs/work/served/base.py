# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server with a client, and what its clients use."""

import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path

HOST = '127.0.0.1'


class Served(ABC):
    """A server that runs, and connections to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Start the server and connect to it."""

    @abstractmethod
    def use(self, number: int) -> None:
        """Round `number`, from 1: read what the last round has written, and write. AssertionError."""

    def run(self, *command: str) -> None:
        with Path('server.log').open('ab') as log:
            self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def connect(self, address: str | tuple[str, int]) -> socket.socket:
        """A connection to a server that may still be starting."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        while True:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.connect(address)
            except OSError:
                sock.close()
                if self.server.poll() is not None:
                    raise
                time.sleep(0.01)
            else:
                sock.settimeout(20)
                return sock


def asked(sock: socket.socket, request: bytes, size: int) -> bytes:
    sock.sendall(request)
    answer = b''
    while len(answer) < size:
        more = sock.recv(size - len(answer))
        assert more, f'end of file after {answer!r}'
        answer += more
    return answer


def is_(value: object, wanted: object) -> None:
    assert value == wanted, f'{value!r}, not {wanted!r}'

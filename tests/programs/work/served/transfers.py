# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs in the middle of a transfer."""

import hashlib
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from base import HOST, Served, is_

BLOCK, LAST = 1 << 16, 5
# copies its input slowly until there is a file `enough`
SLOWLY = """
import os, select, time
while block := os.read(0, 1 << 14):
    while block:
        select.select([], [1], [])      # rsync sets O_NONBLOCK
        block = block[os.write(1, block):]
    if not os.path.exists('enough'):
        time.sleep(0.05)
"""


class Curl(Served):
    """curl fetches a file from a thread of ours, which is slow until the last round."""

    def start(self) -> None:
        self.digest, self.enough = hashlib.sha256(), threading.Event()
        listener = socket.create_server((HOST, self.port))
        threading.Thread(target=self.serve, args=(listener,), daemon=True).start()
        self.run('curl', '--silent', '--show-error', '--output', 'fetched', f'http://{HOST}:{self.port}/')
        await_that(lambda: self.size() > BLOCK)

    def serve(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with listener, connection:
            connection.recv(BLOCK)
            connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n')
            while not self.enough.wait(0.05):
                block = random.randbytes(BLOCK)
                connection.sendall(block)
                self.digest.update(block)

    def size(self) -> int:
        return Path('fetched').stat().st_size if Path('fetched').exists() else 0

    def use(self, number: int) -> None:
        before = self.size()
        await_that(lambda: self.size() > before + BLOCK)
        is_(self.server.poll(), None)
        if number == LAST:
            self.enough.set()
            is_(self.server.wait(60), 0)
            is_(hashlib.sha256(Path('fetched').read_bytes()).digest(), self.digest.digest())


class Rsync(Served):
    """rsync with a program between its two ends that is slow until the last round."""

    def start(self) -> None:
        Path('source').mkdir()
        for number in range(80):
            Path(f'source/{number}').write_bytes(random.randbytes(10 * BLOCK))
        Path('slowly.py').write_text(SLOWLY)
        Path('remote').write_text(f'#!/bin/sh\nshift\n"$@" | {sys.executable} -I slowly.py\n')
        Path('remote').chmod(0o755)
        self.run('rsync', '--archive', '--rsh', './remote', f'{HOST}:{Path.cwd()}/source/', 'copy/')
        await_that(lambda: self.size() > BLOCK)

    def size(self) -> int:
        found = list(Path('copy').glob('*')) + list(Path('copy').glob('.*'))
        return sum(path.stat().st_size for path in found if path.exists())

    def use(self, number: int) -> None:
        before = self.size()
        await_that(lambda: self.size() != before)
        is_(self.server.poll(), None)
        if number == LAST:
            Path('enough').touch()
            is_(self.server.wait(60), 0)
            for path in Path('source').iterdir():
                is_(hashlib.sha256(Path('copy', path.name).read_bytes()).digest(),
                    hashlib.sha256(path.read_bytes()).digest())


def await_that(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, 'nothing moves'
        time.sleep(0.01)

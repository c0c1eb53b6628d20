# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl as its users run it: a process with a command line, an exit status and two streams."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lib.bus import ROOT, Daemon

TIMEOUT = 50


@dataclass
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which has to be one JSON document and nothing else."""
        return json.loads(self.out)


class Ctl:
    """Runs ckptctl with the same options each time."""

    def __init__(self, *options: str, env: dict[str, str] | None = None) -> None:
        self.options, self.env = options, env or {}

    def start(self, *args: str, **options: Any) -> 'subprocess.Popen[str]':
        # a session of its own, as the shell gives a foreground job a process group of its own
        return subprocess.Popen([sys.executable, '-m', 'ckptd.cli', *args, *self.options], text=True, cwd=ROOT,
                                env={**os.environ, **self.env}, start_new_session=True, stdin=subprocess.DEVNULL,
                                **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options})

    def __call__(self, *args: str) -> Done:
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f'ckptctl {" ".join(args)} did not end:\n{out}\n{err}') from None
        assert 'Traceback' not in err, err
        return Done(process.returncode, out, err)

    def interrupt(self, process: 'subprocess.Popen[str]', number: signal.Signals = signal.SIGINT) -> Done:
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
        return Done(process.returncode, out, err)


class Fifo:
    """Where a worker that pauses at a fault point says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR)

    def wait(self) -> None:
        assert select.select([self._fd], [], [], 30)[0], 'the fault point was not reached'
        os.read(self._fd, 4096)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def ctl(daemon: Daemon) -> Ctl:
    """ckptctl that talks to the daemon of this test."""
    return Ctl('--address', daemon.address)


@pytest.fixture
def standalone(spool: Path) -> Ctl:
    """ckptctl with a bus and daemon of its own each time."""
    return Ctl('--standalone', '--spool', str(spool))


@pytest.fixture
def paused(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[tuple[Ctl, Fifo]]:
    """ckptctl whose daemon's checkpoints stop in the middle of memory, and the FIFO that tells when."""
    fifo = Fifo(tmp_path / 'fault')
    daemon = start_daemon(env={'CKPTD_FAULT': 'memory-half=pause', 'CKPTD_FAULT_FILE': str(fifo.path)})
    yield Ctl('--address', daemon.address), fifo
    fifo.close()

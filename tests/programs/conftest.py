# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs of others, checkpointed with --standalone while they run: nothing here was written with ckptd in mind."""

import functools
import hashlib
import json
import operator
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.lib import settled
from tests.lib.victim import kill_session, session_members

ROOT = Path(__file__).parents[2]
WORK = Path(__file__).parent / 'work'
FRAME = re.compile(r'^#\d+ ', re.MULTILINE)


class Standalone:
    """`ckptctl --standalone --json` on a spool of the test's own."""

    def __init__(self, spool: Path, directory: Path) -> None:
        self._spool, self._directory = spool, directory

    def _command(self, *args: str) -> list[str]:
        return [sys.executable, '-m', 'ckptd.cli', *args, '--standalone', '--spool', str(self._spool), '--json']

    def __call__(self, *args: str, timeout: float = 120) -> Any:
        for _ in range(20):
            done = subprocess.run(self._command(*args), capture_output=True, text=True, cwd=ROOT, timeout=timeout,
                                  check=False)
            # a shell may be in vfork(2) at that moment; the error says EAGAIN, and that the caller shall try again
            if done.returncode != os.EX_TEMPFAIL:
                break
        assert done.returncode == 0, f'{args}: {done.stdout}{done.stderr}'
        return json.loads(done.stdout) if done.stdout.strip() else None

    def checkpoint(self, pid: int, *args: str) -> dict[str, Any]:
        """The result of a checkpoint whose image is whole."""
        result: dict[str, Any] = self('checkpoint', str(pid), *args)
        self('verify', result['image'])
        return result

    def checkpoint_and_kill(self, process: 'subprocess.Popen[bytes]', *args: str) -> dict[str, Any]:
        """The same; the tree is dead afterwards, by SIGKILL, and its pids are free."""
        assert process.poll() is None, f'{process.args!r} has ended already'
        result = self.checkpoint(process.pid, '--kill', *args)
        assert process.wait(10) == -signal.SIGKILL
        settled.reap_orphans()
        assert not session_members(process.pid)
        return result

    def restore(self, image: str, *args: str) -> 'Restored':
        """Bring it back: `with standalone.restore(image) as restored: ...; restored.finish()`."""
        return Restored(self._command('restore', image, '--wait', *args))

    def cores(self, image: str) -> dict[int, Path]:
        """The cores of an image, by pid."""
        directory = self._directory / f'cores-{image}'
        self('export', '--format', 'core', image, str(directory))
        return {int(path.suffix[1:]): path for path in directory.glob('core.*')}


class Restored:
    """A tree that was restored, below a ckptctl that waits for its root."""

    def __init__(self, command: list[str]) -> None:
        self._command = command

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, text=True, cwd=ROOT)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        self._process.communicate()

    def finish(self, timeout: float = 200) -> None:
        """Wait for the root, whose exit status is that of ckptctl."""
        out, errors = self._process.communicate(timeout=timeout)
        assert self._process.returncode == 0, f'{out}{errors}'

    def await_end(self, timeout: float = 60) -> None:
        """Wait for the root, which was killed."""
        self._process.communicate(timeout=timeout)
        assert self._process.returncode == 128 + signal.SIGKILL

    def await_that(self, what: str, holds: Callable[[], Any]) -> Any:
        """As the function, and fail with the words of ckptctl when it has ended."""
        def still() -> Any:
            assert self._process.poll() is None, ''.join(self._process.communicate())
            return holds()
        return await_that(what, still)


@pytest.fixture
def standalone(spool: Path, tmp_path: Path) -> Standalone:
    return Standalone(spool, tmp_path)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., 'subprocess.Popen[bytes]']]:
    """Start a program in a session of its own, with its output in a file: program('sort', ..., output='sorted')."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*command: str | Path, output: str = 'output') -> 'subprocess.Popen[bytes]':
        with (tmp_path / output).open('wb') as out, (tmp_path / f'{output}.errors').open('wb') as errors:
            running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, cwd=tmp_path,
                                            start_new_session=True))
        return running[-1]

    yield start
    for process in running:
        # a server may replace a worker that is killed before it is
        deadline = time.monotonic() + 10
        while session_members(process.pid) and time.monotonic() < deadline:
            kill_session(process.pid)
            process.poll()
            settled.reap_orphans()
        process.wait()


def backtraces(executable: str | Path, core: Path) -> list[str]:
    """What gdb says of each thread of a core: its frames, innermost first."""
    done = subprocess.run(['gdb', '--batch', '-nx', '-iex', 'set debuginfod enabled off', '-ex', 'thread apply all bt',
                           executable, core], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert 'Core was generated by' in done.stdout, done.stdout + done.stderr
    threads = done.stdout.split('\nThread ')[1:]
    assert all(FRAME.search(thread) for thread in threads), done.stdout
    return threads


def await_that(what: str, holds: Callable[[], Any], timeout: float = 60) -> Any:
    """Poll a program that was not made to tell anybody how far it is."""
    deadline = time.monotonic() + timeout
    while not (value := holds()):
        assert time.monotonic() < deadline, f'not within {timeout} s: {what}'
        time.sleep(0.01)
    return value


A, C, WORD = 6364136223846793005, 1442695040888963407, 1 << 64


def advanced(value: int, rounds: int) -> int:
    """value after so many rounds of x -> A * x + C modulo 2**64, which the programs in work/ do one by one."""
    factor, term = A, C
    while rounds:
        if rounds & 1:
            value = (value * factor + term) % WORD
        factor, term = factor * factor % WORD, (term * factor + term) % WORD
        rounds >>= 1
    return value


def pooled(count: int) -> int:
    """What work/pool.py has after so many results."""
    return functools.reduce(operator.xor, (advanced(number, 20_000) for number in range(count)))


def chained(rounds: int) -> str:
    """What work/compute.js has after so many rounds."""
    value = b'start'
    for _ in range(rounds):
        value = hashlib.pbkdf2_hmac('sha256', value, b'salt', 1000, 32)
    return value.hex()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Worker processes: one for each job, and a warm spare, since Python takes longer to start than a small dump.

A worker is `python -m ckptd.engine.worker FD`, in a session of its own so that a terminal's Ctrl-C reaches the daemon
only. FD is its end of a SOCK_SEQPACKET pair; ckptd.engine.messages says what goes over it. Either side learns of the
other's death by end-of-file.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

import ckptd
from ckptd.engine.messages import MAX_MESSAGE, FromWorker, ToWorker
from ckptd.errors import WorkerDied

log = logging.getLogger(__name__)

# -P: a directory named ckptd where the daemon was started must not be what root runs
COMMAND = (sys.executable, '-P', '-m', 'ckptd.engine.worker')
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromWorker)


class Worker:
    """One worker process and the daemon's end of its socket. Owned by whoever took it from the pool, until `end`."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        with theirs:
            theirs.setblocking(True)
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())], pass_fds=(theirs.fileno(),), start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=_environment())
            except OSError as error:
                self._socket.close()
                raise WorkerDied(f'no worker can be started: {error.strerror}', errno=error.errno,
                                 hint='see limits on processes and memory') from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: ToWorker, fds: Sequence[int] = ()) -> None:
        """One packet. It does not wait: what a worker is ever sent fits the socket's buffer many times over."""
        try:
            socket.send_fds(self._socket, [_encoder.encode(message)], fds)
        except OSError as error:
            raise self.died(error.strerror or 'its socket is closed') from error

    async def receive(self) -> FromWorker | None:
        """The next message; None when the worker has closed its end (it ended, or it died)."""
        try:
            packet = await asyncio.get_running_loop().sock_recv(self._socket, MAX_MESSAGE + 1)
        except ConnectionError:
            return None     # it died with packets of ours unread
        if not packet:
            return None
        try:
            return cast(FromWorker, _decoder.decode(packet))
        except msgspec.MsgspecError as error:
            raise self.died(f'it sent what is no message: {error}') from error

    def died(self, why: str) -> WorkerDied:
        return WorkerDied(f'worker {self.pid}: {why}')

    def kill(self) -> None:
        """SIGKILL; safe at any time, since the process is not reaped by anybody but this object."""
        self._process.kill()

    async def end(self, patience: float) -> int:
        """Close the socket, wait for the exit, SIGKILL after `patience` seconds. The status as subprocess has it."""
        self._socket.close()
        if self.alive and not await _wait_exit(self._process.pid, patience):
            log.error('worker %d does not end: killing it', self.pid)
            self.kill()
            await _wait_exit(self._process.pid, None)
        return self._process.wait()

    @staticmethod
    def describe(status: int) -> str:
        """'was killed by SIGKILL' or 'exited with status 3'."""
        if status >= 0:
            return f'exited with status {status}'
        with contextlib.suppress(ValueError):
            return f'was killed by {signal.Signals(-status).name}'
        return f'was killed by signal {-status}'


def _environment() -> dict[str, str]:
    """Ours, the same ckptd from wherever this one was imported, and what of its log anybody will read."""
    home = str(Path(ckptd.__file__).parent.parent)
    others = [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep) if path and path != home]
    level = logging.getLevelName(logging.getLogger('ckptd.engine').getEffectiveLevel())
    return {**os.environ, 'PYTHONPATH': os.pathsep.join([home, *others]), 'CKPTD_LOG_LEVEL': level}


async def _wait_exit(pid: int, patience: float | None) -> bool:
    """Wait for the exit of a child that nobody has reaped: its pidfd becomes readable (pidfd_open(2))."""
    loop = asyncio.get_running_loop()
    pidfd = os.pidfd_open(pid)
    exited = asyncio.Event()
    loop.add_reader(pidfd, exited.set)
    try:
        await asyncio.wait_for(exited.wait(), patience)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return True


class WorkerPool:
    """Starts workers and keeps one ready."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._spare: Worker | None = None
        self._taken: set[Worker] = set()

    @property
    def pids(self) -> tuple[int, ...]:
        """Every worker that there is: none may be in a tree that one of them freezes."""
        spare = (self._spare.pid,) if self._spare else ()
        return spare + tuple(worker.pid for worker in self._taken)

    def warm(self) -> None:
        """Start the spare, unless there is one. One that cannot be started is tried again when it is needed."""
        if self._spare is None:
            try:
                self._spare = Worker(self._command)
            except WorkerDied as error:
                log.warning('no spare worker: %s', error)

    def take(self) -> Worker:
        """The spare, if it lives, else a new one."""
        spare, self._spare = self._spare, None
        if spare is not None and not spare.alive:
            log.warning('spare worker %d is dead', spare.pid)
            spare._socket.close()
            spare = None
        worker = spare or Worker(self._command)
        self._taken.add(worker)
        return worker

    async def give_back(self, worker: Worker, patience: float = 5.0) -> int:
        """The job is over: end its process, whatever state it is in. Its exit status."""
        try:
            return await worker.end(patience)
        finally:
            self._taken.discard(worker)

    async def close(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            await spare.end(5.0)

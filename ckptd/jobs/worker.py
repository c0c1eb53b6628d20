# SPDX-License-Identifier: LGPL-2.1-or-later
"""Worker processes: one for each job, and a warm spare, since Python takes longer to start than a small dump.

What a worker restores inherits for ever what the worker itself is under (seccomp filter, mount namespace, no_new_privs,
capability bounds): where systemd can be asked, restores are done by a service of their own, service.py.

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
from abc import ABC, abstractmethod
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
MAX_STATUS = 255            # a worker that said what failed exits with the status of the error
LAST_PATIENCE = 3.0     # seconds that a killed worker has to end; what waits for somebody's file system may not
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromWorker)


class Worker(ABC):
    """One worker process and the daemon's end of its socket. Owned by whoever took it from the pool, until `end`."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self._socket, self.pid = sock, pid
        self.stuck = False      # it was killed, and does not end

    def send(self, message: ToWorker, fds: Sequence[int] = ()) -> None:
        """One packet. It does not wait: what a worker is ever sent fits the socket's buffer many times over."""
        try:
            socket.send_fds(self._socket, [_encoder.encode(message)], fds)
        except OSError as error:
            raise self.died(error.strerror or 'its socket is closed') from error

    async def receive(self) -> FromWorker | None:
        """The next message; None when the worker has closed its end (it ended, or it died)."""
        loop = asyncio.get_running_loop()
        try:
            packet = await loop.sock_recv(self._socket, MAX_MESSAGE + 1)
        except ConnectionResetError:
            # it has ended with a packet of ours unread. That is told once, and before what it had sent (sock_error())
            packet = await loop.sock_recv(self._socket, MAX_MESSAGE + 1)
        if not packet:
            return None
        try:
            return cast(FromWorker, _decoder.decode(packet))
        except msgspec.MsgspecError as error:
            raise self.died(f'it sent what is no message: {error}') from error

    def died(self, why: str) -> WorkerDied:
        return WorkerDied(f'worker {self.pid}: {why}')

    def close(self) -> None:
        """Close the socket: a worker that lives lets go and ends."""
        self._socket.close()

    def give_up(self) -> None:
        """Hear nothing from it any more: `receive` says that it has ended."""
        with contextlib.suppress(OSError):      # closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL; safe at any time until `end` has returned."""

    async def end(self, patience: float) -> int:
        """Close the socket, wait for the exit, SIGKILL after `patience` seconds. The status as subprocess has it; that
        of the signal for one that is stuck, which `wait_end` still waits for."""
        self.close()
        if not await self._exited(patience):
            log.error('worker %d does not end: killing it', self.pid)
            self.kill()
            if not await self._exited(LAST_PATIENCE):
                log.error('worker %d does not even end by SIGKILL: it waits for a file of somebody else\'s', self.pid)
                self.stuck = True
                return -signal.SIGKILL
        return await self._status()

    async def wait_end(self) -> None:
        """Of one that is stuck: until it has ended after all."""
        await self._exited(None)
        await self._status()

    @abstractmethod
    async def _exited(self, patience: float | None) -> bool:
        """Wait for the exit; False after `patience` seconds."""

    @abstractmethod
    async def _status(self) -> int:
        """Exit status of a process that has ended, which is forgotten."""

    @staticmethod
    def describe(status: int) -> str:
        """'was killed by SIGKILL' or 'exited with status 3'."""
        if status >= 0:
            return f'exited with status {status}'
        with contextlib.suppress(ValueError):
            return f'was killed by {signal.Signals(-status).name}'
        return f'was killed by signal {-status}'


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """(the daemon's end, the worker's): the one never blocks, the other does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    theirs.setblocking(True)
    return ours, theirs


class ChildWorker(Worker):
    """A child of the daemon. No signal hits another process: nobody but this object reaps it."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        ours, theirs = socket_pair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno())], pass_fds=(theirs.fileno(),), start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=_environment())
            except OSError as error:
                ours.close()
                raise WorkerDied(f'no worker can be started: {error.strerror}', errno=error.errno,
                                 hint='see limits on processes and memory') from error
        super().__init__(ours, self._process.pid)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    async def _exited(self, patience: float | None) -> bool:
        return not self.alive or await _wait_exit(self.pid, patience)

    async def _status(self) -> int:
        return self._process.wait()


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

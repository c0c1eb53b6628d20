# SPDX-License-Identifier: LGPL-2.1-or-later
"""Worker processes: one for each job, started by a process that has all modules loaded (spawner.py).

A restored task keeps for ever what its worker is under: seccomp filter, mount namespace, no_new_privs, capability
bounds. So where systemd is available, a service of its own does the restore (service.py).

A worker has one end of a SOCK_SEQPACKET pair; ckptd.protocol.messages defines the messages. Each side notices the
other's death by end-of-file and by a pidfd.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self, cast

import msgspec

from ckptd.errors import WorkerDied
from ckptd.jobs.interpreter import command, environment
from ckptd.jobs.spawner import ChildProcess, SpawnerClient
from ckptd.protocol.messages import MAX_MESSAGE, Follow, FromWorker, ToWorker

log = logging.getLogger(__name__)

COMMAND = command('ckptd.worker.main')      # command line of a worker that is not forked
MAX_STATUS = 255            # a worker that reported an error exits with the error's status
LAST_PATIENCE = 3.0     # seconds for a killed worker to end; one that waits for a user's file system may not end
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromWorker)


class WorkerHandle(ABC):
    """A worker process, its pidfd, and the daemon's end of its socket. The code that took it from the pool owns it
    until `end`."""

    def __init__(self, sock: socket.socket, pid: int, pidfd: int) -> None:
        self._socket, self.pid, self._pidfd = sock, pid, pidfd
        self.stuck = False      # it was killed and does not end
        self._dead = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._died)

    def send(self, message: ToWorker, fds: Sequence[int] = ()) -> None:
        """Send one packet. It never waits, because the socket's buffer has room for many times what a worker is ever
        sent."""
        try:
            socket.send_fds(self._socket, [_encoder.encode(message)], fds)
        except OSError as error:
            raise self.died(error.strerror or 'its socket is closed') from error

    async def receive(self) -> FromWorker | None:
        """Return the next message, or None when the worker has closed its end: it ended or died."""
        loop = asyncio.get_running_loop()
        try:
            packet = await loop.sock_recv(self._socket, MAX_MESSAGE + 1)
        except ConnectionResetError:
            # The worker ended with a packet of ours unread. The error comes once, before the data that it had sent
            # (sock_error()).
            packet = await loop.sock_recv(self._socket, MAX_MESSAGE + 1)
        if not packet:
            return None
        try:
            return cast(FromWorker, _decoder.decode(packet))
        except msgspec.MsgspecError as error:
            raise self.died(f'it sent an invalid message: {error}') from error

    def died(self, why: str) -> WorkerDied:
        return WorkerDied(f'worker {self.pid}: {why}')

    def close(self) -> None:
        """Close the socket. A living worker then releases its tree and ends."""
        self._socket.close()

    def give_up(self) -> None:
        """Stop receiving: `receive` then reports that the worker has ended."""
        with contextlib.suppress(OSError):      # closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """Send SIGKILL. Do nothing if it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def end(self, patience: float) -> int:
        """Close the socket and wait for the exit; send SIGKILL after `patience` seconds. Return the status as in
        subprocess. For a stuck worker return that of the signal; `wait_end` still waits for it."""
        self.close()
        if not await self._exited(patience):
            log.error('worker %d does not end: killing it', self.pid)
            self.kill()
            if not await self._exited(LAST_PATIENCE):
                log.error('worker %d does not end by SIGKILL: it waits for a file system of a user', self.pid)
                self.stuck = True
                return -signal.SIGKILL
        return await self._forget()

    async def wait_end(self) -> None:
        """Wait until a stuck worker has ended after all."""
        await self._dead.wait()
        await self._forget()

    async def _exited(self, patience: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._dead.wait()
        return self._dead.is_set()

    async def _forget(self) -> int:
        os.close(self._pidfd)
        self._pidfd = -1
        return await self._status()

    @abstractmethod
    async def _status(self) -> int:
        """Return the exit status of the process, which has ended."""

    def _died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._dead.set()
        # Others may hold the worker's end of the socket; for a service, systemd does. What the worker had sent is still
        # received, and then end-of-file (unix(7)).
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    @staticmethod
    def describe(status: int) -> str:
        """Return 'was killed by SIGKILL' or 'exited with status 3'."""
        if status > MAX_STATUS:
            return 'ended with an unknown status'
        if status >= 0:
            return f'exited with status {status}'
        with contextlib.suppress(ValueError):
            return f'was killed by {signal.Signals(-status).name}'
        return f'was killed by signal {-status}'


def socket_pair(liveness: int) -> tuple[socket.socket, socket.socket]:
    """Return (the daemon's end, the worker's end). The daemon's never blocks, the worker's does. liveness: the pidfd
    that reports the daemon's death, sent before the worker exists; -1 for none."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    theirs.setblocking(True)
    if liveness >= 0:
        try:
            socket.send_fds(ours, [_encoder.encode(Follow())], [liveness])
        except OSError:         # ETOOMANYREFS (unix(7))
            ours.close()
            theirs.close()
            raise
    return ours, theirs


class ChildWorker(WorkerHandle):
    """A worker started by a spawner."""

    def __init__(self, sock: socket.socket, child: ChildProcess) -> None:
        super().__init__(sock, child.pid, child.pidfd)
        self._child = child

    @classmethod
    async def start(cls, spawner: SpawnerClient, command: Sequence[str] = ()) -> Self:
        """Start a worker. command: a program to run instead. WorkerDied if it cannot be started."""
        ours, theirs = socket_pair(spawner.liveness)
        try:
            with theirs:
                return cls(ours, await spawner.spawn(theirs, command, environment() if command else None))
        except BaseException:
            ours.close()
            raise

    async def _status(self) -> int:
        return await asyncio.shield(self._child.exited)

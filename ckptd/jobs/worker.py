# SPDX-License-Identifier: LGPL-2.1-or-later
"""Worker processes: one for each job, started by a process that has all modules already, spawner.py.

What a worker restores inherits for ever what the worker itself is under (seccomp filter, mount namespace, no_new_privs,
capability bounds): where systemd can be asked, restores are done by a service of their own, service.py.

A worker has one end of a SOCK_SEQPACKET pair; ckptd.protocol.messages says what goes over it. Either side learns of the
other's death by end-of-file, and by a pidfd.
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

COMMAND = command('ckptd.worker.main')      # of one that is not forked
MAX_STATUS = 255            # a worker that said what failed exits with the status of the error
LAST_PATIENCE = 3.0     # seconds that a killed worker has to end; what waits for somebody's file system may not
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromWorker)


class WorkerHandle(ABC):
    """One worker process, its pidfd, and the daemon's end of its socket. Owned by whoever took it from the pool, until
    `end`."""

    def __init__(self, sock: socket.socket, pid: int, pidfd: int) -> None:
        self._socket, self.pid, self._pidfd = sock, pid, pidfd
        self.stuck = False      # it was killed, and does not end
        self._dead = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._died)

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

    def kill(self) -> None:
        """SIGKILL. Of one that has ended: nothing."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

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
        return await self._forget()

    async def wait_end(self) -> None:
        """Of one that is stuck: until it has ended after all."""
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
        """Exit status of the process, which has ended."""

    def _died(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._dead.set()
        # others may have its end of the socket: a service's systemd has. unix(7): what it had sent is still received,
        # and end-of-file after that
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    @staticmethod
    def describe(status: int) -> str:
        """'was killed by SIGKILL' or 'exited with status 3'."""
        if status > MAX_STATUS:
            return 'ended, nobody knows how'
        if status >= 0:
            return f'exited with status {status}'
        with contextlib.suppress(ValueError):
            return f'was killed by {signal.Signals(-status).name}'
        return f'was killed by signal {-status}'


def socket_pair(liveness: int) -> tuple[socket.socket, socket.socket]:
    """(the daemon's end, the worker's): the one never blocks, the other does. witness: the pidfd that tells of the
    daemon's death, which is there before the worker is; -1 for none."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    theirs.setblocking(True)
    if liveness >= 0:
        try:
            socket.send_fds(ours, [_encoder.encode(Follow())], [liveness])
        except OSError:         # ETOOMANYREFS, unix(7)
            ours.close()
            theirs.close()
            raise
    return ours, theirs


class ChildWorker(WorkerHandle):
    """A worker that a spawner has started."""

    def __init__(self, sock: socket.socket, child: ChildProcess) -> None:
        super().__init__(sock, child.pid, child.pidfd)
        self._child = child

    @classmethod
    async def start(cls, spawner: SpawnerClient, command: Sequence[str] = ()) -> Self:
        """command: a program instead. WorkerDied when there will be none."""
        ours, theirs = socket_pair(spawner.liveness)
        try:
            with theirs:
                return cls(ours, await spawner.spawn(theirs, command, environment() if command else None))
        except BaseException:
            ours.close()
            raise

    async def _status(self) -> int:
        return await asyncio.shield(self._child.exited)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's end of the process that starts workers (ckptd.worker.spawner)."""

import asyncio
import itertools
import logging
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ckptd.errors import WorkerDied
from ckptd.jobs.interpreter import command
from ckptd.protocol.messages import MAX_SPAWN, Exited, FromSpawner, Spawned, SpawnWorker

log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(FromSpawner)

COMMAND = command('ckptd.worker.spawner')
PATIENCE = 2.0      # seconds
UNKNOWN = 256       # exit status when the spawner died; no process has it, and this one may have died, too


@dataclass(slots=True, eq=False)
class ChildProcess:
    """A process that was started."""
    started: asyncio.Future[None]
    exited: asyncio.Future[int]
    pid: int = 0
    pidfd: int = field(default=-1)    # the owner closes it


class SpawnerClient:
    """A client of the spawner. It starts the spawner with the first `spawn`, and again after its death.

    environment: of the spawner and the workers. liveness: the pidfd that tells them of the daemon's death
    (ckptd.kernel.liveness), -1 for none.
    """

    def __init__(self, environment: Mapping[str, str], liveness: int = -1) -> None:
        self._environment, self.liveness = environment, liveness
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._numbers = itertools.count(1)
        self._children: dict[int, ChildProcess] = {}
        self._loop = asyncio.get_running_loop()

    @property
    def pid(self) -> int:
        """Pid of the spawner, 0 if it does not run."""
        return self._process.pid if self._process is not None else 0

    async def spawn(self, sock: socket.socket, command: Sequence[str] = (), environment: Mapping[str, str] | None = None
                    ) -> ChildProcess:
        """Start a worker, or a program, with this end of a socketpair. WorkerDied if that fails."""
        ours = self._socket or self.start()
        number = next(self._numbers)
        child = self._children[number] = ChildProcess(self._loop.create_future(), self._loop.create_future())
        try:
            wish = SpawnWorker(number, tuple(command), dict(environment or {}))
            socket.send_fds(ours, [_encoder.encode(wish)], [sock.fileno()])
        except OSError as error:
            del self._children[number]
            if isinstance(error, BrokenPipeError | ConnectionResetError):
                self._died()        # the loop has not noticed the death yet, and the next try needs a new spawner
            raise WorkerDied(f'cannot start a worker: {error.strerror}', errno=error.errno) from error
        try:
            await asyncio.shield(child.started)
        except asyncio.CancelledError:
            child.started.add_done_callback(lambda _: _forget(child))
            raise
        return child

    def start(self) -> socket.socket:
        """Start the spawner now and return its socket. WorkerDied."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        theirs.setblocking(True)
        with theirs:
            fds = [fd for fd in (theirs.fileno(), self.liveness) if fd >= 0]
            try:
                self._process = subprocess.Popen(
                    [*COMMAND, *map(str, fds)], pass_fds=fds, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(self._environment))
            except OSError as error:
                ours.close()
                raise WorkerDied(f'cannot start a worker: {error.strerror}', errno=error.errno,
                                 hint='check the limits on processes and memory') from error
        self._socket = ours
        self._loop.add_reader(ours, self._readable)
        return ours

    def close(self) -> None:
        """End the spawner. Running workers are not affected."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        if self._process is not None:
            try:
                self._process.wait(PATIENCE)        # it ends at once, by end-of-file
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for child in list(self._children.values()):
            _lose(child)
        self._children.clear()

    def _readable(self) -> None:
        assert self._socket is not None
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, MAX_SPAWN, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:       # it ended with unread data
                data, fds = b'', []
            if not data:
                self._died()
                return
            self._take(data, fds)

    def _died(self) -> None:
        log.error('the process that starts workers has died')
        self.close()

    def _take(self, data: bytes, fds: list[int]) -> None:
        message: Spawned | Exited = _decoder.decode(data)
        child = self._children[message.number]
        if not isinstance(message, Spawned):
            del self._children[message.number]
            child.exited.set_result(message.status)
        elif message.pid:
            child.pid, child.pidfd = message.pid, fds[0]
            child.started.set_result(None)
        else:
            del self._children[message.number]
            child.started.set_exception(WorkerDied(
                f'cannot start a worker: {os.strerror(message.errno)}', errno=message.errno,
                hint='check the limits on processes and memory'))


def _forget(child: ChildProcess) -> None:
    """Drop a child that is no longer wanted. Its socket is closed, so it ends."""
    if child.started.exception() is None:
        os.close(child.pidfd)


def _lose(child: ChildProcess) -> None:
    if not child.started.done():
        child.started.set_exception(WorkerDied('the process that starts workers has died'))
    if not child.exited.done():
        child.exited.set_result(UNKNOWN)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Workers that ask a test what to do at each fault point, and the daemons that they belong to."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self

from ckptd.bus.client import Client, Signals, connect
from ckptd.bus.names import BUS_NAME, JOB, MANAGER, ROOT
from tests.lib.bus import Daemon

PATIENCE = 20.0     # seconds for anything


class Gate:
    """Where workers ask (CKPTD_FAULT='*=ask'). They go on everywhere but at the point that is waited for."""

    def __init__(self) -> None:
        # a socket's path has at most 107 bytes and pytest's directories are longer than that can be
        self._home = tempfile.TemporaryDirectory(prefix='ckptd-gate-')
        Path(self._home.name).chmod(0o711)      # a worker may be any user
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.path = Path(self._home.name, 'ask')
        self._socket.bind(str(self.path))
        self.path.chmod(0o666)
        self._socket.listen(64)
        self.passed: list[str] = []
        self.look: Callable[[str, int], object] = lambda point, pid: None   # before a worker goes on

    @property
    def environment(self) -> dict[str, str]:
        return {'CKPTD_FAULT': '*=ask', 'CKPTD_FAULT_FILE': str(self.path)}

    def close(self) -> None:
        self._socket.close()
        self._home.cleanup()

    async def stand(self, point: str, nth: int = 1) -> 'Standing':
        """A worker that comes to the point for the nth time; all others go on. Cancel it to give up."""
        loop = asyncio.get_running_loop()
        while True:
            # loop.sock_accept() would lose a connection that comes as it is cancelled
            await until_readable(self._socket.fileno())
            asking, _ = self._socket.accept()
            asking.setblocking(False)
            with contextlib.ExitStack() as stack:
                stack.enter_context(asking)
                here = (await loop.sock_recv(asking, 64)).decode()
                self.passed.append(here)
                nth -= here == point
                if here == point and not nth:
                    stack.pop_all()
                    return Standing(asking, here)
                self.look(here, peer_of(asking))

    async def wave_on(self) -> None:
        """Let all workers pass, until cancelled."""
        await self.stand('')

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Let all workers pass in the meantime."""
        task = asyncio.create_task(self.wave_on())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def peer_of(asking: socket.socket) -> int:
    """The pid of who is at the other end, unix(7)."""
    return int(struct.unpack('3i', asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


class Standing:
    """A worker at a fault point."""

    def __init__(self, asking: socket.socket, point: str) -> None:
        self._socket, self.point = asking, point
        self.pid = peer_of(asking)
        self.pidfd = os.pidfd_open(self.pid)

    def answer(self, action: str = '') -> None:
        """Have it do that, or go on."""
        if action:
            self._socket.send(action.encode())
        self._socket.close()

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def gone(self) -> None:
        """Until it is dead."""
        await readable(self.pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        os.close(self.pidfd)


async def readable(fd: int) -> None:
    """Until poll(2) says so; of a pidfd: until its process is dead."""
    async with asyncio.timeout(PATIENCE):
        await until_readable(fd)


async def until_readable(fd: int) -> None:
    """The same, for as long as it takes."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


@contextlib.contextmanager
def asking(path: Path, point: str, nth: int, act: Callable[[], object]) -> Iterator[dict[str, str]]:
    """The same without a loop: an environment for workers, which all go on, after act() where one has come to the point
    for the nth time. With '*' any point counts."""
    def answer() -> None:
        left = nth
        while True:
            connection, _ = asked.accept()
            with connection:
                if not (here := connection.recv(64).decode()):
                    return
                left -= point in ('*', here)
                if not left and point in ('*', here):
                    act()
                connection.send(b'')

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
        asked.bind(str(path))
        asked.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield {'CKPTD_FAULT': f'{point}=ask', 'CKPTD_FAULT_FILE': str(path)}
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
                last.connect(str(path))
            thread.join()
            path.unlink()


class Api:
    """A client of a daemon that asks for one checkpoint."""

    def __init__(self, client: Client, signals: Signals) -> None:
        self.client, self.signals = client, signals

    async def checkpoint(self, pid: int, options: dict[str, Any]) -> str:
        return str(await self.client.call(BUS_NAME, ROOT, MANAGER, 'Checkpoint', 'sa{sv}', f'pid:{pid}', options))

    async def cancel(self, job: str) -> None:
        await self.client.call(BUS_NAME, job, JOB, 'Cancel', 'a{sv}', {})

    async def thaw(self, pid: int) -> None:
        await self.client.call(BUS_NAME, ROOT, MANAGER, 'Thaw', 'sa{sv}', f'pid:{pid}', {})

    async def ended(self, job: str, patience: float = PATIENCE) -> dict[str, Any]:
        """Properties of the job after it ended."""
        async with asyncio.timeout(patience):
            async for one in self.signals:
                if one.member == 'JobRemoved' and one.args[1] == job:
                    break
        return await self.client.properties(BUS_NAME, job, JOB)


@contextlib.asynccontextmanager
async def api(daemon: Daemon) -> AsyncIterator[Api]:
    async with await connect(daemon.address) as client, client.signals(BUS_NAME, ROOT) as signals:
        yield Api(client, signals)


async def end(daemon: Daemon) -> None:
    """kill -9, and see it dead."""
    pidfd = os.pidfd_open(daemon.pid)
    try:
        os.kill(daemon.pid, signal.SIGKILL)
        await readable(pidfd)
    finally:
        os.close(pidfd)

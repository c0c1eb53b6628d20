# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs in Python: asyncio, multiprocessing."""

import asyncio
import multiprocessing
from multiprocessing.synchronize import Lock

from base import HOST, Served, is_


class Asyncio(Served):
    """An event loop with its self-pipe, a server and a client over TCP and a unix socket, in one process."""

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.add_signal_handler(10, lambda: None)
        self.loop.run_until_complete(self.connect_all())

    async def connect_all(self) -> None:
        self.servers = [await asyncio.start_server(self.echo, HOST, self.port),
                        await asyncio.start_unix_server(self.echo, 'echo.sock')]
        self.streams = [await asyncio.open_connection(HOST, self.port), await asyncio.open_unix_connection('echo.sock')]

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)

    def use(self, number: int) -> None:
        self.loop.run_until_complete(self.echoes(number))

    async def echoes(self, number: int) -> None:
        for reader, writer in self.streams:
            writer.write(b'%d\n' % number)
            is_(await asyncio.wait_for(reader.readline(), 20), b'%d\n' % number)
        is_(await asyncio.to_thread(lambda: number), number)


class Multiprocessing(Served):
    """A manager, queues and locks between processes that a server forks, and between such as are spawned."""

    def start(self) -> None:
        self.parts = [Processes(method) for method in ('forkserver', 'spawn')]

    def use(self, number: int) -> None:
        for part in self.parts:
            part.use(number)


class Processes:
    """A manager, a process that answers, and a lock that nobody else has opened. Each round starts processes that open
    it by its name; its creator maps it under another name, which is deleted."""

    def __init__(self, method: str) -> None:
        self.context = multiprocessing.get_context(method)
        self.manager = self.context.Manager()
        self.rounds = self.manager.list()
        self.requests, self.answers = self.context.Queue(), self.context.Queue()
        self.lock, self.alone = self.context.Lock(), self.context.Lock()
        self.child = self.context.Process(target=answer, args=(self.requests, self.answers, self.lock), daemon=True)
        self.child.start()

    def use(self, number: int) -> None:
        self.rounds.append(number)
        is_(list(self.rounds), list(range(1, number + 1)))
        with self.lock:
            self.requests.put(number)
        is_(self.answers.get(timeout=20), number)
        with self.alone:
            is_(self.tried(), False)
        is_(self.tried(), True)

    def tried(self) -> object:
        """Whether a new process could take the lock."""
        process = self.context.Process(target=try_lock, args=(self.alone, self.answers))
        process.start()
        said = self.answers.get(timeout=20)
        process.join(20)
        is_(process.exitcode, 0)
        return said


def answer(requests: 'multiprocessing.Queue[int]', answers: 'multiprocessing.Queue[int]', lock: Lock) -> None:
    while True:
        number = requests.get()
        with lock:
            answers.put(number)


def try_lock(lock: Lock, answers: 'multiprocessing.Queue[bool]') -> None:
    if taken := lock.acquire(block=False):
        lock.release()
    answers.put(taken)

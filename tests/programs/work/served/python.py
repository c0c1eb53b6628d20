# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs in Python: asyncio, multiprocessing."""

import asyncio
import multiprocessing

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


class Manager(Served):
    """multiprocessing: a manager, a queue and a lock between processes, and a server that forks."""

    def start(self) -> None:
        context = multiprocessing.get_context('forkserver')
        self.manager = context.Manager()
        self.rounds = self.manager.list()
        self.requests, self.answers, self.lock = context.Queue(), context.Queue(), context.Lock()
        self.child = context.Process(target=answer, args=(self.requests, self.answers, self.lock), daemon=True)
        self.child.start()
        self.context = context

    def use(self, number: int) -> None:
        self.rounds.append(number)
        is_(list(self.rounds), list(range(1, number + 1)))
        with self.lock:
            self.requests.put(number)
        is_(self.answers.get(timeout=20), number)
        other = self.context.Process(target=answer_once, args=(number, self.answers))
        other.start()
        is_(self.answers.get(timeout=20), -number)
        other.join(20)
        is_(other.exitcode, 0)


def answer(requests: 'multiprocessing.Queue[int]', answers: 'multiprocessing.Queue[int]', lock: object) -> None:
    while True:
        number = requests.get()
        with lock:      # type: ignore[attr-defined]
            answers.put(number)


def answer_once(number: int, answers: 'multiprocessing.Queue[int]') -> None:
    answers.put(-number)

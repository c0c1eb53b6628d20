# SPDX-License-Identifier: LGPL-2.1-or-later
"""An asyncio program: its loop wakes itself through a socket pair, and it serves a unix socket to its own clients."""

import asyncio
import os
import signal
import threading

from victim import ready, wait_for_go

NAME = 'asyncio.sock'


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(b'answer to ' + line)
        await writer.drain()
    writer.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> None:
    writer.write(question + b'\n')
    assert await reader.readline() == b'answer to ' + question + b'\n'


async def main() -> None:
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, signalled.set)      # through the self-pipe
    server = await asyncio.start_unix_server(answer, NAME)
    clients = [await asyncio.open_unix_connection(NAME) for _ in range(3)]
    for reader, writer in clients:
        await ask(reader, writer, b'first')
    sleeping = asyncio.create_task(asyncio.sleep(0.5))
    ready()
    wait_for_go()
    for number, (reader, writer) in enumerate(clients):
        await ask(reader, writer, b'question %d' % number)
    reader, writer = await asyncio.open_unix_connection(NAME)
    await ask(reader, writer, b'of a new client')
    os.kill(os.getpid(), signal.SIGUSR1)
    await signalled.wait()
    woken = asyncio.Event()
    threading.Thread(target=lambda: loop.call_soon_threadsafe(woken.set)).start()
    await woken.wait()
    await sleeping
    for _, one in (*clients, (reader, writer)):
        one.close()
        await one.wait_closed()
    server.close()
    await server.wait_closed()
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


asyncio.run(main())

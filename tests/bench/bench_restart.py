# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long restarts take: trees of sleeping processes by size, and a process with random memory.

Each image is restored several times, the tree killed in between; figures are medians after one run that does not count.
Beside the memory stands what the machine can do at that time: a plain read(2) of the same file, from the page cache as
in the restart, into memory that was touched before.
"""

import asyncio
import mmap
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ckptd.bus.names import BUS_NAME, MANAGER, ROOT
from ckptd.inspect.scan import scan_tree
from tests.bench.bench_dump import MemoryProcess
from tests.bench.bench_scan import build, room, sleeping_tree
from tests.lib import settled
from tests.lib.bus import Daemon
from tests.worker.faulty import api

PHASES = ('verify_time', 'plan_time', 'create_time', 'fill_time', 'rebuild_time', 'start_time')


class Row(NamedTuple):
    """Medians in microseconds. read_time: of the plain read(2), 0 where there is none to compare with."""
    name: str
    tasks: int
    bytes: int
    times: dict[str, int]
    total: int
    read_time: int = 0

    def facts(self) -> dict[str, Any]:
        """For a program."""
        found = {'name': self.name, 'tasks': self.tasks, 'bytes': self.bytes, **self.times, 'total_time': self.total}
        if self.read_time:
            found |= {'read_time': self.read_time, 'fill_ratio': self.times['fill_time'] / self.read_time,
                      'ratio': self.total / self.read_time}
        return found


async def job(daemon: Daemon, method: str, about: str, options: dict[str, Any]) -> dict[str, Any]:
    """The result of a job."""
    async with api(daemon) as client:
        path = await client.client.call(BUS_NAME, ROOT, MANAGER, method, 'sa{sv}', about, options)
        ended = await client.ended(path, patience=600)
    if ended['State'] != 'done':
        raise SystemExit(f'{ended["Error"]}')
    result: dict[str, Any] = ended['Result']
    return result


def kill(root: int) -> None:
    """A restored tree, all of it; we are the subreaper."""
    members = [task.tgid for task in scan_tree([root]).leaders]
    for pid in members:
        os.kill(pid, signal.SIGKILL)
    for pid in members:     # parents first, whatever their numbers: what they leave is ours to reap
        os.waitpid(pid, 0)


def plain_read(path: Path) -> int:
    """Microseconds of read(2) of a file that is in the page cache into memory that is there."""
    size = path.stat().st_size
    with mmap.mmap(-1, size) as memory, path.open('rb', buffering=0) as file:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        view, done = memoryview(memory), 0
        begin = time.monotonic()
        while done < size:
            done += file.readinto(view[done:])
        spent = time.monotonic() - begin
        view.release()
    return round(spent * 1e6)


def measure(name: str, daemon: Daemon, root: int, runs: int, *, compare: bool = False) -> Row:
    """Dump and kill the tree, and restore it `runs` times and one more."""
    image = asyncio.run(job(daemon, 'Checkpoint', f'pid:{root}', {'after': 'kill', 'timeout': 120_000_000}))['image']
    settled.reap_orphans()
    results, reads = [], []
    for _ in range(runs + 1):
        if compare:
            reads.append(plain_read(daemon.spool / image / 'data-0.img'))
        results.append(asyncio.run(job(daemon, 'Restore', image, {})))
        kill(root)
    asyncio.run(remove(daemon, image))
    times = {phase: round(median(result[phase] for result in results[1:])) for phase in PHASES}
    return Row(name, results[0]['tasks'], results[0]['bytes'], times,
               round(median(result['restored_usec'] for result in results[1:])),
               round(median(reads[1:])) if compare else 0)


async def remove(daemon: Daemon, image: str) -> None:
    async with api(daemon) as client:
        await client.client.call(BUS_NAME, ROOT, MANAGER, 'RemoveImage', 's', image)


def run(tasks: list[int], mib: int, daemon: Daemon, runs: int, directory: Path) -> Iterator[Row]:
    settled.become_subreaper()
    program = build(directory)
    for count in tasks:
        with sleeping_tree(program, max(1, min(count, room()))) as root:
            yield measure(f'{count} sleeping processes', daemon, root, runs)
    if mib:
        memory = MemoryProcess.start(mib, daemon.spool.parent)
        yield measure(f'{mib} MiB of random memory', daemon, memory.pid, runs, compare=True)


HEAD = (f'{"milliseconds":<26}{"tasks":>6}{"verify":>9}{"plan":>9}{"create":>9}{"fill":>9}{"rebuild":>9}{"start":>9}'
        f'{"total":>9}{"per task":>9}{"MB":>9}{"MB/s":>7}')


def lines(row: Row) -> Iterator[str]:
    times = ''.join(f'{row.times[phase] / 1e3:>9.1f}' for phase in PHASES)
    yield (f'{row.name:<26}{row.tasks:>6}{times}{row.total / 1e3:>9.1f}{row.total / 1e3 / row.tasks:>9.2f}'
           f'{row.bytes / 1e6:>9.1f}{row.bytes / row.total:>7.0f}')
    if row.read_time:
        for phase, ours in (('fill', row.times['fill_time']), ('total', row.total)):
            yield (f'  plain {"read(2) of it":<22}{"":>31}{row.read_time / 1e3:>9.1f}{"":>36}'
                   f'{row.bytes / row.read_time:>7.0f}   {phase} takes {ours / row.read_time:.2f} times as long')

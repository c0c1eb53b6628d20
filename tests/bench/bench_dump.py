# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long checkpoints take: trees of sleeping processes by size, and a process with random memory.

That process also writes its memory to the spool's disk itself, by plain write(2) and fsync(2), in turn with the
checkpoints: what the disk gives at that time. Every figure is the median of several runs after one that does not count,
since the first touch of the page cache is slow in a virtual machine. Every image is verified.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

from ckptd.image.verify import verify
from tests.bench.bench_scan import build, room, sleeping_tree
from tests.lib.bus import Daemon
from tests.worker.faulty import api

PHASES = ('freezing_time', 'frozen_time', 'memdump_time', 'memwrite_time', 'total_time')
MEMORY = """
import mmap, os, sys, time, zlib
size, path = int(sys.argv[1]) << 20, sys.argv[2]
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size, 1 << 20):
    memory[at:at + (1 << 20)] = os.urandom(1 << 20)
view, before = memoryview(memory), zlib.crc32(memory)
print('ready', flush=True)
for line in sys.stdin:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    start, done = time.monotonic(), 0
    while done < size:
        done += os.write(fd, view[done:done + (64 << 20)])
    written = time.monotonic() - start
    os.fsync(fd)
    synced = time.monotonic() - start
    os.close(fd)
    os.unlink(path)
    print(written, synced, flush=True)
sys.exit(zlib.crc32(memory) != before)
"""


class Row(NamedTuple):
    """Medians. Times in microseconds, of `spool` phases by name; plain: of write(2), and of that with fsync(2)."""
    name: str
    tasks: int
    bytes: int
    times: dict[str, int]
    plain: tuple[int, int] | None = None

    def facts(self) -> dict[str, Any]:
        """For a program."""
        found = {'name': self.name, 'tasks': self.tasks, 'bytes': self.bytes, **self.times}
        if self.plain:
            written, synced = self.plain
            found |= {'write_time': written, 'write_fsync_time': synced, 'ratio': self.times['total_time'] / synced}
        return found


class MemoryProcess:
    """A process with random memory that it checks at its end."""

    def __init__(self, process: 'subprocess.Popen[str]') -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    def start(cls, mib: int, disk: Path) -> Self:
        process = subprocess.Popen([sys.executable, '-c', MEMORY, str(mib), str(disk / 'plain')], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == 'ready\n'
        return cls(process)

    def write(self) -> tuple[float, float]:
        """Have it write its memory; seconds without and with fsync(2)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        written, synced = map(float, self._process.stdout.readline().split())
        return written, synced

    def end(self) -> bool:
        """Whether its memory is as it was."""
        assert self._process.stdout is not None
        self._process.communicate()
        return self._process.wait() == 0


@contextmanager
def memory_process(mib: int, disk: Path) -> Iterator[MemoryProcess]:
    """One with that much memory, for the time of the block; its memory is as it was at the end."""
    process = MemoryProcess.start(mib, disk)
    try:
        yield process
    finally:
        unharmed = process.end()
    assert unharmed, 'the memory of the process has changed'


async def checkpoint(daemon: Daemon, pid: int) -> dict[str, Any]:
    """The result of a checkpoint; its image is verified and removed."""
    async with api(daemon) as client:
        job = await client.ended(await client.checkpoint(pid, {'timeout': 120_000_000}), patience=600)
    if job['State'] != 'done':
        raise SystemExit(f'{job["Error"]}')
    result: dict[str, Any] = job['Result']
    image = daemon.spool / result['image']
    if damages := verify(image):
        raise SystemExit(f'{image}: {damages}')
    shutil.rmtree(image)
    return result


def measure(name: str, daemon: Daemon, pid: int, runs: int, memory: MemoryProcess | None = None) -> Row:
    """One row. With `memory` the process writes its memory itself before each checkpoint."""
    results, plain = [], []
    for _ in range(runs + 1):
        if memory:
            plain.append(memory.write())
        results.append(asyncio.run(checkpoint(daemon, pid)))
    times = {phase: round(median(result[phase] for result in results[1:])) for phase in PHASES}
    return Row(name, results[0]['tasks'], results[-1]['pages_written'] * 4096, times,
               (round(median(one[0] for one in plain[1:]) * 1e6),
                round(median(one[1] for one in plain[1:]) * 1e6)) if plain else None)


def run(tasks: list[int], mib: int, daemon: Daemon, runs: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix='ckptd-bench-') as directory:
        program = build(Path(directory))
        for count in tasks:
            with sleeping_tree(program, max(1, min(count, room()))) as root:
                yield measure(f'{count} sleeping processes', daemon, root, runs)
    if mib:
        with memory_process(mib, daemon.spool.parent) as memory:
            yield measure(f'{mib} MiB of random memory', daemon, memory.pid, runs, memory)


HEAD = (f'{"milliseconds":<26}{"tasks":>6}{"freeze":>9}{"frozen":>9}{"copy":>9}{"sync":>9}{"total":>9}{"per task":>9}'
        f'{"MB":>9}{"MB/s":>7}')


def lines(row: Row) -> Iterator[str]:
    times = ''.join(f'{row.times[phase] / 1e3:>9.1f}' for phase in PHASES)
    total = row.times['total_time']
    yield (f'{row.name:<26}{row.tasks:>6}{times}{total / 1e3 / row.tasks:>9.2f}{row.bytes / 1e6:>9.1f}'
           f'{row.bytes / total:>7.0f}')
    if row.plain:
        for what, spent, ours, phase in (('write(2) of it', row.plain[0], row.times['memdump_time'], 'copy'),
                                         ('write(2) and fsync(2)', row.plain[1], total, 'total')):
            yield (f'  plain {what:<22}{"":>32}{spent / 1e3:>9.1f}{"":>18}{row.bytes / spent:>7.0f}'
                   f'   {phase} takes {ours / spent:.2f} times as long')

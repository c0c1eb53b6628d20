# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long checkpoints take: python -m tests.bench.bench_dump [--tasks N ...] [--memory MIB] [--spool DIR]

Trees of sleeping processes by size, and one process with random memory. That process first writes its memory to a file
of the spool's disk itself, by plain write(2) and fsync(2): what the disk gives, in the same run. Every checkpoint is
`ckptctl checkpoint --standalone`, as a user would run it, and every image is verified.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ckptd.scan import scan_tree
from tests.bench.bench_scan import build, room, sleeping_tree, timed

MEMORY = """
import mmap, os, sys, time
size, path = int(sys.argv[1]) << 20, sys.argv[2]
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, size, 1 << 20):
    memory[at:at + (1 << 20)] = os.urandom(1 << 20)
view = memoryview(memory)
fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
start = time.monotonic()
done = 0
while done < size:
    done += os.write(fd, view[done:done + (64 << 20)])
written = time.monotonic() - start
os.fsync(fd)
synced = time.monotonic() - start
os.close(fd)
os.unlink(path)
print(written, synced, flush=True)
sys.stdin.read()
"""


class Row(NamedTuple):
    """One checkpoint. Times in seconds; plain: (write, write and fsync) of the same bytes, if there was one."""
    name: str
    scan: float
    result: dict[str, Any]
    plain: tuple[float, float] | None = None

    @property
    def bytes(self) -> int:
        return int(self.result['pages_written']) * 4096


def checkpoint(pid: int, spool: Path) -> dict[str, Any]:
    """The result of one checkpoint; its image is verified and removed."""
    def ctl(*args: str) -> str:
        command = (sys.executable, '-m', 'ckptd.cli', *args, '--standalone', '--spool', str(spool), '--json')
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(ctl('checkpoint', str(pid), '--timeout', '2min'))
    ctl('verify', result['image'])
    ctl('remove', result['image'])
    return result


@contextmanager
def memory_process(mib: int, spool: Path) -> Iterator[tuple[int, tuple[float, float]]]:
    """(pid of a process with that much random memory, seconds of its own write of it without and with fsync)."""
    with subprocess.Popen([sys.executable, '-c', MEMORY, str(mib), str(spool / 'plain')], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        written, synced = map(float, process.stdout.readline().split())
        yield process.pid, (written, synced)
        process.stdin.close()


def run(tasks: list[int], mib: int, spool: Path) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix='ckptd-bench-') as directory:
        program = build(Path(directory))
        for count in tasks:
            with sleeping_tree(program, max(1, min(count, room()))) as root:
                scan = timed(lambda: scan_tree([root]))
                yield Row(f'{count} sleeping processes', scan, checkpoint(root, spool))
    if mib:
        with memory_process(mib, spool) as (pid, plain):
            yield Row(f'{mib} MiB of random memory', timed(lambda: scan_tree([pid])), checkpoint(pid, spool), plain)


def line(row: Row) -> str:
    result = row.result
    times = ''.join(f'{value:>10.1f}' for value in (row.scan * 1e3, *(result[name] / 1e3 for name in (
        'freezing_time', 'frozen_time', 'memdump_time', 'memwrite_time', 'total_time'))))
    rate = row.bytes / (result['total_time'] / 1e6) / 1e6
    text = f'{row.name:<26}{result["tasks"]:>6}{times}{row.bytes / 1e6:>9.1f}{rate:>8.0f}'
    if row.plain is not None:
        written, synced = (row.bytes / seconds / 1e6 for seconds in row.plain)
        text += f'\n{"  the same by write(2)":<26}{"":>6}{"":>60}{row.bytes / 1e6:>9.1f}{written:>8.0f}'
        text += f'\n{"  and fsync(2)":<26}{"":>6}{"":>60}{row.bytes / 1e6:>9.1f}{synced:>8.0f}'
    return text


HEAD = (f'{"milliseconds":<26}{"tasks":>6}{"scan":>10}{"freeze":>10}{"frozen":>10}{"copy":>10}{"sync":>10}{"total":>10}'
        f'{"MB":>9}{"MB/s":>8}')


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--tasks', type=int, nargs='*', default=[10, 100, 1000], metavar='N')
    parser.add_argument('--memory', type=int, default=1024, metavar='MIB')
    parser.add_argument('--spool', type=Path, metavar='DIR', help='a directory on the disk to measure')
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix='ckptd-bench-', dir=options.spool) as spool:
        print(HEAD)
        for row in run(options.tasks, options.memory, Path(spool)):
            print(line(row), flush=True)


if __name__ == '__main__':
    main()

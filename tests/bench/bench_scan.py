# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long the scan and the checks of a tree take, by its size.

The tree is made of processes of a small C program that sleep; every tenth has children of its own. It ends with the
FIFO that this program holds, so nothing is left of it however the benchmark ends. A FIFO has a name: a restored tree
finds this program at its other end again, which it would not at that of a pipe.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import BinaryIO, NamedTuple

from ckptd.inspect.checks import check_tree
from ckptd.inspect.scan import Handles, scan_tree
from ckptd.protocol.requests import Caller

PID_RESERVE = 1000      # pids left to everybody else
FORKER = r"""
/* forker COUNT: a root, then COUNT - 1 processes below it in groups of ten; all wait for the end of fd 0 */
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

static void rest(void) { char c; while (read(0, &c, 1) > 0) ; while (wait(0) > 0) ; _exit(0); }

int main(int argc, char **argv)
{
    long left = argc > 1 ? atol(argv[1]) - 1 : 0;
    while (left > 0) {
        long below = left < 10 ? left - 1 : 9;
        switch (fork()) {
        case -1: return 1;
        case 0:
            while (below-- > 0)
                switch (fork()) { case -1: _exit(1); case 0: write(1, "r", 1); rest(); }
            write(1, "r", 1);
            rest();
        }
        left -= below + 1;
    }
    write(1, "r", 1);
    rest();
}
"""


class Times(NamedTuple):
    """Seconds."""
    tasks: int
    scan: float
    handles: float
    check: float

    @property
    def per_task(self) -> float:
        """Microseconds of scan for one task."""
        return self.scan / self.tasks * 1e6

    def facts(self) -> dict[str, float]:
        """For a program: microseconds."""
        return {'tasks': self.tasks, 'scan_time': self.scan * 1e6, 'scan_time_per_task': self.per_task,
                'pidfds_time': self.handles * 1e6, 'check_time': self.check * 1e6}


def room() -> int:
    """How many more processes this machine takes."""
    limit = int(Path('/proc/sys/kernel/pid_max').read_text())
    return limit - sum(1 for entry in Path('/proc').iterdir() if entry.name.isdecimal()) - PID_RESERVE


def build(directory: Path) -> Path:
    program = directory / 'forker'
    compiler = shutil.which('cc') or shutil.which('gcc')
    if compiler is None:
        raise SystemExit('bench_scan needs a C compiler: apt install gcc')
    subprocess.run([compiler, '-O2', '-static', '-w', '-x', 'c', '-', '-o', program], input=FORKER, text=True,
                   check=True)
    return program


@contextmanager
def fifo(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Both ends of a new one, which is gone after the block."""
    os.mkfifo(path)
    try:
        # in this order neither open(2) waits for the other end, fifo(7)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(reader, 'rb', buffering=0) as begin, path.open('wb', buffering=0) as end:
            os.set_blocking(reader, True)
            yield begin, end
    finally:
        path.unlink()


@contextmanager
def sleeping_tree(program: Path, tasks: int) -> Iterator[int]:
    """The root of a tree of that many processes."""
    with fifo(program.with_name('end')) as (reader, end), \
            subprocess.Popen([program, str(tasks)], stdin=reader, stdout=subprocess.PIPE) as root:
        assert root.stdout is not None
        try:
            ready = 0
            while ready < tasks and (chunk := os.read(root.stdout.fileno(), 65536)):
                ready += len(chunk)
            yield root.pid
        finally:
            end.close()
            while root.stdout.read(65536):      # the last of them has closed it
                pass


def timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def measure(root: int, runs: int) -> Times:
    tree = scan_tree([root])

    def hold() -> None:
        with Handles(tree):
            pass

    def usual(work: Callable[[], object]) -> float:
        timed(work)     # does not count: caches, and the first touch of memory
        return median(timed(work) for _ in range(runs))
    caller = Caller(os.getuid(), os.getgid(), tuple(os.getgroups()), os.getpid())
    return Times(len(tree), usual(lambda: scan_tree([root])), usual(hold), usual(lambda: check_tree(tree, caller)))


def run(sizes: Sequence[int], runs: int) -> list[Times]:
    """Medians, of trees of these sizes or of the largest that there is room for."""
    with tempfile.TemporaryDirectory(prefix='ckptd-bench-') as directory:
        program = build(Path(directory))
        found = []
        for size in sizes:
            with sleeping_tree(program, max(1, min(size, room()))) as root:
                found.append(measure(root, runs))
        return found


def table(rows: Sequence[Times]) -> str:
    lines = [f'{"tasks":>7} {"scan ms":>9} {"us/task":>8} {"pidfds ms":>10} {"check ms":>9}']
    lines += [f'{row.tasks:>7} {row.scan * 1e3:>9.1f} {row.per_task:>8.1f} {row.handles * 1e3:>10.1f} '
              f'{row.check * 1e3:>9.1f}' for row in rows]
    return '\n'.join(lines)

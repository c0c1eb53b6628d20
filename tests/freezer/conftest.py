# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting trees, the cgroups that they are in, and a journal."""

import contextlib
import mmap
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.inspect.scan import ResolvedTarget, scan_tree
from ckptd.journal import Journal
from ckptd.kernel.cgroup import find_mount
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2, read_children
from ckptd.tree import Tree
from tests.lib.settled import remove_cgroup

TICKER = Path(__file__).with_name('ticker.py')


class Ticker:
    """A running ticker.py; `pids` are its processes, the root first."""

    def __init__(self, cgroup: Path, children: int = 0, how: str = '') -> None:
        fd = os.memfd_create('counters', 0)
        ready, theirs = os.pipe()
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            self._memory = mmap.mmap(fd, mmap.PAGESIZE)
            command = [sys.executable, '-I', '-S', str(TICKER), str(fd), str(theirs), str(children), how]
            self.process = subprocess.Popen(command, pass_fds=(fd, theirs),
                                            preexec_fn=lambda: (cgroup / 'cgroup.procs').write_text('0'))
        finally:
            os.close(theirs)
            os.close(fd)
        self._await_ready(ready, children + (3 if how == 'threads' else 1))
        self.pids = [self.pid, *read_children(self.pid, self.pid)]

    def _await_ready(self, fd: int, count: int) -> None:
        try:
            while count:
                assert select.select([fd], [], [], 10)[0], 'the ticker does not start'
                got = len(os.read(fd, count))
                if not got:
                    if self.process.wait() == 77:
                        pytest.skip('no userfaultfd')
                    raise AssertionError('the ticker died')
                count -= got
        finally:
            os.close(fd)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def target(self) -> ResolvedTarget:
        return ResolvedTarget((self.pid,), None, None, f'process {self.pid}')

    def scan(self) -> Tree:
        return scan_tree((self.pid,))

    def count(self, slot: int = 0) -> int:
        return int.from_bytes(self._memory[slot * 8:slot * 8 + 8], 'little')

    def counts(self, slots: int) -> list[int]:
        return [self.count(slot) for slot in range(slots)]

    def runs(self, slot: int = 0) -> bool:
        """It counts, within 20 s."""
        before, deadline = self.count(slot), time.monotonic() + 20
        while self.count(slot) == before and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.count(slot) != before

    def comes_to(self, state: str) -> bool:
        """The root is in this state, within 20 s."""
        deadline = time.monotonic() + 20
        while (found := read_stat(self.pid).state) != state and time.monotonic() < deadline:
            time.sleep(0.001)
        return found == state

    def stands_still(self, slots: int = 1) -> bool:
        before = self.counts(slots)
        time.sleep(0.02)        # a task that ran would count twenty times
        return self.counts(slots) == before

    def kill(self) -> None:
        for task in reversed(self.scan().leaders):
            with contextlib.suppress(ProcessLookupError):
                os.kill(task.tid, 9)
        self.process.wait()
        self._memory.close()


def name_of(path: Path) -> str:
    """The cgroup's name in /proc/PID/cgroup."""
    return '/' + path.relative_to(find_mount().path).as_posix()


def put(path: Path, *pids: int) -> None:
    for pid in pids:
        (path / 'cgroup.procs').write_text(str(pid))


def set_frozen(path: Path, wanted: bool) -> None:
    """Write cgroup.freeze and wait for the kernel."""
    (path / 'cgroup.freeze').write_text(str(int(wanted)))
    fd = os.open(path / 'cgroup.events', os.O_RDONLY)
    poll = select.poll()
    poll.register(fd, select.POLLPRI)
    try:
        while f'frozen {int(wanted)}' not in os.pread(fd, 4096, 0).decode():
            assert poll.poll(20_000), f'{path} does not become {wanted}'
    finally:
        os.close(fd)


def is_frozen(path: Path) -> bool:
    return (path / 'cgroup.freeze').read_text() == '1\n'


def cgroups_of(pids: list[int]) -> list[str]:
    return [read_cgroup2(pid) for pid in pids]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / 'run')


@pytest.fixture
def tick(cgroup: Path) -> Iterator[Callable[..., Ticker]]:
    """Start tickers: tick(), tick(children=3), tick(cgroup=path, how='churn')."""
    running: list[Ticker] = []

    def start(cgroup: Path = cgroup, **kwargs: object) -> Ticker:
        running.append(Ticker(cgroup, **kwargs))
        return running[-1]

    yield start
    for ticker in running:
        ticker.kill()


@pytest.fixture
def nest(cgroup: Path) -> Iterator[Callable[[str], Path]]:
    """Make cgroups below the test's: nest('a/b')."""
    def make(below: str) -> Path:
        path = cgroup / below
        path.mkdir(parents=True)
        return path
    yield make
    if cgroup.exists():
        remove_cgroup(cgroup)
        cgroup.mkdir()

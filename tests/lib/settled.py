# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test may not leave behind: live processes, open fds, threads, cgroups.

The test process makes itself the subreaper of all it starts, so a daemon or victim that outlives its parent is still
found, and moves into a cgroup of its own, so what ckptd makes beside it is found and nobody else's is. Both hold for
each pytest-xdist worker by itself.
"""

import contextlib
import ctypes
import fcntl
import gc
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptd.kernel.status import read_status
from tests.lib.gate import own_cgroup

PR_SET_CHILD_SUBREAPER = 36     # <linux/prctl.h>
_OF_NPTL = 0b11 << 31           # signals 32 and 33
GRACE = 3.0                     # seconds for what is dying already


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock of flock(2) on a file, which may be gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def become_subreaper() -> None:
    """prctl(2): orphans of our descendants become our children, not those of PID 1."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), 'prctl(PR_SET_CHILD_SUBREAPER)')


@contextlib.contextmanager
def cgroup_of_our_own() -> Iterator[Path | None]:
    """Move into a new child cgroup for the session; None where none can be made (an ordinary user)."""
    home = own_cgroup()
    if home is None or not os.access(home / 'cgroup.procs', os.W_OK):
        yield None
        return
    for stale in home.glob('ckptd-tests-*'):        # of test runs that were killed
        if not Path('/proc', stale.name.rpartition('-')[2]).exists():
            with contextlib.suppress(OSError):      # another worker was faster
                remove_cgroup(stale)
    own = home / f'ckptd-tests-{os.getpid()}'
    own.mkdir()
    (own / 'cgroup.procs').write_text(str(os.getpid()))
    try:
        yield own
    finally:
        (home / 'cgroup.procs').write_text(str(os.getpid()))
        remove_cgroup(own)


def remove_cgroup(path: Path) -> None:
    """Kill what is in it, frozen or not, wait for that, and remove it with all below it."""
    events = path / 'cgroup.events'
    kill = path / 'cgroup.kill'     # since 5.14; it kills frozen tasks too
    if kill.exists():
        kill.write_text('1')
    fd = os.open(events, os.O_RDONLY)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        deadline = time.monotonic() + GRACE
        # a dead task counts as population until it is reaped, and ours are reaped by us
        while 'populated 1' in os.pread(fd, 4096, 0).decode() and time.monotonic() < deadline:
            reap([pid for pid in children() if is_zombie(pid)])
            poll.poll(50)
    finally:
        os.close(fd)
    for directory in sorted(path.rglob('*/'), reverse=True):
        directory.rmdir()
    path.rmdir()


def children() -> list[int]:
    """All direct children of this process, of every thread, zombies too."""
    found = []
    for task in os.listdir('/proc/self/task'):  # noqa: PTH208
        # a thread that has ended since left its children to another one
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(pid) for pid in Path(f'/proc/self/task/{task}/children').read_text().split()]
    return found


def is_zombie(pid: int) -> bool:
    try:
        stat = Path(f'/proc/{pid}/stat').read_text(errors='replace')
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(')')[2].split()[0] in 'ZX'


def reap(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def reap_orphans() -> None:
    """What a killed tree left to us, its subreaper: until it is waited for, its pids are taken."""
    reap([pid for pid in children() if is_zombie(pid)])


def _open_files() -> dict[int, str]:
    found = {}
    for entry in os.listdir('/proc/self/fd'):  # noqa: PTH208 - twice a test, and four times as fast as pathlib
        # the listing's own fd is in the list and gone by now
        with contextlib.suppress(FileNotFoundError):
            found[int(entry)] = os.readlink(f'/proc/self/fd/{entry}')  # noqa: PTH115
    return found


def describe(pid: int) -> str:
    """'pid (command line) state' for a message; the process may vanish at any time."""
    with contextlib.suppress(OSError):
        line = Path(f'/proc/{pid}/cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace').strip()
        rows = Path(f'/proc/{pid}/status').read_text(errors='replace').splitlines()
        fields = dict(row.split(':\t', 1) for row in rows if ':\t' in row)
        return f'{pid} ({line or fields["Name"]}) state {fields["State"]} tracer {fields["TracerPid"]}'
    return f'{pid} (gone)'


def _ignored() -> int:
    """Mask of ignored signals, without those that nptl(7) keeps to itself and handles as soon as there are threads."""
    return read_status(os.getpid()).sig_ign & ~_OF_NPTL


@dataclass
class Picture:
    """What there is around the test process, before or after a test."""
    processes: set[int]
    files: dict[int, str]
    threads: set[threading.Thread]
    cgroups: set[Path]
    ignored: int        # mask of signals, which every child inherits

    @classmethod
    def take(cls, cgroup: Path | None) -> 'Picture':
        return cls(set(children()), _open_files(), set(threading.enumerate()),
                   set(cgroup.rglob('*/')) if cgroup else set(), _ignored())

    def left(self, cgroup: Path | None) -> list[str]:
        """One sentence for each thing that is there now and was not then, which is also removed where it can be."""
        sentences = self._processes_left()
        join_closers()
        for path in sorted(set(cgroup.rglob('*/')) - self.cgroups if cgroup else ()):
            if path.exists():
                sentences.append(f'cgroup {path} was left, frozen {(path / "cgroup.freeze").read_text().strip()}')
                remove_cgroup(path)
        new = self._files_left()
        if new:
            gc.collect()        # what only a reference cycle still holds is not a leak
            sentences += [f'fd {fd} -> {link} was left open' for fd, link in sorted(self._files_left().items())]
        for thread in set(threading.enumerate()) - set(self.threads):
            thread.join(GRACE)          # one that was told to stop may be on its way
            if thread.is_alive():
                sentences.append(f'thread {thread.name} was left running')
        if (ignored := _ignored()) != self.ignored:
            sentences.append(f'signals {ignored:#x} are ignored, and {self.ignored:#x} were before')
        return sentences

    def _files_left(self) -> dict[int, str]:
        return {fd: link for fd, link in _open_files().items() if self.files.get(fd) != link}

    def _processes_left(self) -> list[str]:
        deadline = time.monotonic() + GRACE
        sentences = []
        # killing one may orphan more of them to us, so look until nobody is left
        while new := set(children()) - self.processes:
            for pid in sorted(new):
                if not _dies(pid, deadline):
                    sentences.append(f'process {describe(pid)} was left running')
                    os.kill(pid, signal.SIGKILL)
                    _dies(pid, time.monotonic() + GRACE)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        return sentences


def join_closers() -> None:
    """Wait for the threads of ckptd.kernel.closing."""
    for thread in threading.enumerate():
        if thread.name == 'close':
            thread.join(GRACE)


def _dies(pid: int, deadline: float) -> bool:
    """Wait for the death of a child until the deadline."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0])
    finally:
        os.close(fd)

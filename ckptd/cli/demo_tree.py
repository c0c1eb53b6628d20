# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree that `ckptctl demo` checkpoints: python -m ckptd.cli.demo_tree DIRECTORY

    supervisor
    ├─ counter      two threads, each counting in a shared file mapping and in memory of its own
    ├─ counter
    ├─ producer     writes numbers into a pipe
    └─ consumer     reads them, checks that none is missing or twice

The file `counters` in DIRECTORY is an array of u64, one for each slot below, which the demo reads while the tree runs.
The tree reports through the FIFO `ready` that it is complete. It ends when its supervisor gets SIGTERM. Every process
then compares its private counts with those in shared memory, and exits with status 0 only if they agree.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

COUNTERS = 'counters'
READY = 'ready'
SLOTS = ('counter 1, thread 1', 'counter 1, thread 2', 'counter 2, thread 1', 'counter 2, thread 2', 'numbers sent',
         'numbers received')
SIZE = mmap.PAGESIZE
BALLAST = 4 << 20           # bytes of private memory that each counter fills, so that there is something to write
PAUSE = 0.002

_PR_SET_NAME, _PR_SET_PTRACER = 15, 0x59616D61      # <linux/prctl.h>
_PR_SET_PTRACER_ANY = 2**64 - 1


class Stop:
    """An event that is set by a signal handler. threading.Event does not fit: the code that the handler interrupts may
    hold its lock."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def wait(self, seconds: float) -> bool:
        time.sleep(seconds)
        return self.is_set


_stop = Stop()
_U64 = struct.Struct('=Q')


def main(directory: Path) -> int:
    """Start the children, report that, wait for SIGTERM, end them. Return 0 if the counts of all of them agree."""
    counters = _map(directory)
    receiver, sender = os.pipe()
    jobs: list[tuple[str, Callable[[], int]]] = [
        ('counter', lambda: _count(counters, 0, receiver, sender)),
        ('counter', lambda: _count(counters, 2, receiver, sender)),
        ('producer', lambda: _produce(counters, sender, receiver)),
        ('consumer', lambda: _consume(counters, receiver, sender))]
    signal.signal(signal.SIGTERM, lambda number, frame: _stop.set())
    _introduce('supervisor')
    children = [_fork(name, job) for name, job in jobs]
    os.close(receiver)
    os.close(sender)
    (directory / READY).write_text(f'{os.getpid()}\n')
    while not _stop.wait(PAUSE):
        pass
    return _end(children)


def read_counters(directory: Path) -> list[int]:
    """Read the value of every slot."""
    data = (directory / COUNTERS).read_bytes()
    return [_U64.unpack_from(data, slot * _U64.size)[0] for slot in range(len(SLOTS))]


def _map(directory: Path) -> mmap.mmap:
    with (directory / COUNTERS).open('w+b') as file:
        file.truncate(SIZE)
        return mmap.mmap(file.fileno(), SIZE)


def _fork(name: str, job: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        _introduce(name)
        status = 1
        try:
            status = job()
        finally:
            os._exit(status)
    return pid


def _end(children: list[int]) -> int:
    for child in children:
        os.kill(child, signal.SIGTERM)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def _introduce(name: str) -> None:
    """Set a name for ps, and allow tracers that are not ancestors, which Yama's ptrace_scope 1 requires (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(_PR_SET_PTRACER_ANY), 0, 0, 0)


def _count(counters: mmap.mmap, first: int, *unused: int) -> int:
    """Run two threads that count in shared and in private memory. The counts must agree at the end."""
    for fd in unused:
        os.close(fd)
    ballast = bytearray(os.urandom(BALLAST))
    digest = hash(bytes(ballast))
    private = [0, 0]

    def run(index: int) -> None:
        while not _stop.wait(PAUSE):
            private[index] += 1
            _add(counters, first + index)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(1)
    agreed = [_get(counters, first + index) for index in (0, 1)] == private
    return 0 if agreed and hash(bytes(ballast)) == digest else 1


def _produce(counters: mmap.mmap, sender: int, receiver: int) -> int:
    os.close(receiver)
    number = 0
    while not _stop.is_set:
        os.write(sender, _U64.pack(number))
        number += 1
        _add(counters, 4)
        time.sleep(PAUSE)
    return 0


def _consume(counters: mmap.mmap, receiver: int, sender: int) -> int:
    """Read until the producer has closed the pipe. Return 1 if a checkpoint lost or doubled a number."""
    os.close(sender)
    expected = 0
    while data := os.read(receiver, _U64.size):
        if _U64.unpack(data)[0] != expected:
            return 1
        expected += 1
        _add(counters, 5)
    return 0


def _add(counters: mmap.mmap, slot: int) -> None:
    _U64.pack_into(counters, slot * _U64.size, _get(counters, slot) + 1)


def _get(counters: mmap.mmap, slot: int) -> int:
    value: int = _U64.unpack_from(counters, slot * _U64.size)[0]
    return value


if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))

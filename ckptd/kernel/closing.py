# SPDX-License-Identifier: LGPL-2.1-or-later
"""Close file descriptors that came from clients.

close(2) may send a request to the file's file system (FUSE_FLUSH). With FUSE that can be a client's program that never
answers, and then not even SIGKILL ends the call. So each such close has a thread of its own. When half of the close
slots are taken, abort the FUSE connections that hold most of them, because otherwise one user could take all slots.
Below that, abort none: the server may just be slow.
"""

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ckptd.kernel import fuse
from ckptd.kernel.statx import device_of

MOST: Final = 256       # closes that wait for a file system; beyond that no fds are taken in
CROWD: Final = MOST // 2        # from this number on connections are aborted
ROOM: Final = MOST // 4         # until fewer than this number wait
PATIENCE: Final = 1.0   # seconds; a server that has answered each close by then is only slow
# targets of /proc/self/fd for files without a file system
_OURS: Final = ('pipe:', 'anon_inode:[pidfd]', 'pidfd:')


@dataclass(frozen=True, slots=True)
class Aborted:
    """A connection to a file server that was aborted."""
    device: int    # as returned by `device_of`
    closes: int    # number of closes that waited for it

    def __str__(self) -> str:
        return (f'the connection to the file server of device {self.device >> 20}:{self.device & 0xfffff} was aborted; '
                f'closes of clients\' files that it did not answer: {self.closes}')


@dataclass(slots=True)
class _Close:
    """A close that waits."""
    since: float
    device: int = 0    # 0 while unknown


class _Closer:
    """Closes each fd in a thread of its own. report: called in any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: dict[int, _Close] = {}
        self._relieving = False
        self.report: Callable[[Aborted], None] = lambda aborted: None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __call__(self, fd: int) -> None:
        with self._changed:
            number = next(self._numbers)
            self._waiting[number] = one = _Close(time.monotonic())
            crowded = not self._relieving and len(self._waiting) >= CROWD
            self._relieving |= crowded
        _start(lambda: self._work(fd, number, one))
        if crowded:
            _start(self._relieve)

    def _work(self, fd: int, number: int, one: _Close) -> None:
        one.device = device_of(fd)
        _close(fd)
        with self._changed:
            del self._waiting[number]
            self._changed.notify_all()

    def _relieve(self) -> None:
        """Abort connections while too many closes wait. Only one thread does this."""
        bound, aborted, vain = CROWD, False, set[int]()
        while True:
            with self._changed:
                if self._fewer(bound, 0.0 if aborted else PATIENCE):
                    self._relieving = False
                    return
            if aborted := self._abort_worst(PATIENCE, vain):
                bound = ROOM

    def abort_all(self) -> None:
        vain = set[int]()
        if not self._fewer(1, PATIENCE):
            while self._waiting and self._abort_worst(0.0, vain):
                continue

    def _abort_worst(self, age: float, vain: set[int]) -> bool:
        """Abort the connection that most closes wait for, among those where a close waits for longer than `age`
        seconds. Return False if there is none. vain: devices where an abort did not end the closes; they are not tried
        again."""
        if (directory := fuse.connections()) is None:
            return False
        for aborted in self._late(age):
            if aborted.device not in vain and fuse.abort(directory, aborted.device):
                self.report(aborted)
                if not self._none_of(aborted.device, PATIENCE):
                    vain.add(aborted.device)
                return True
        return False

    def _fewer(self, bound: int, timeout: float) -> bool:
        """Wait until fewer than `bound` closes wait. Return False after the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._waiting) < bound, timeout)

    def _none_of(self, device: int, timeout: float) -> bool:
        """Wait until no close waits for that device. Return False after the timeout."""
        with self._changed:
            return self._changed.wait_for(lambda: device not in self._devices(), timeout)

    def _devices(self) -> list[int]:
        return [one.device for one in self._waiting.values()]

    def _late(self, age: float) -> list[Aborted]:
        with self._changed:
            before = time.monotonic() - age
            late = {one.device for one in self._waiting.values() if one.since <= before}
            return [Aborted(device, count) for device, count in Counter(self._devices()).most_common()
                    if device in late]


def _start(work: Callable[[], None]) -> None:
    # a daemon thread, so that the interpreter does not wait for it at exit
    threading.Thread(target=work, name='close', daemon=True).start()


def _close(fd: int) -> None:
    # an error would be that of a client's file system (close(2), EIO)
    with contextlib.suppress(OSError):
        os.close(fd)


_closer = _Closer()


def close_foreign(fd: int) -> None:
    """Close without an error and without waiting, neither for a file system nor for unsent data of a socket, which its
    sender may have requested (SO_LINGER, socket(7))."""
    try:
        link = os.readlink(f'/proc/self/fd/{fd}')  # noqa: PTH115 - fstat(2) may ask a file server
    except OSError:
        link = ''
    if link.startswith('socket:'):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 0, 0))
        _close(fd)
    elif link.startswith(_OURS):
        _close(fd)
    else:
        _closer(fd)


def closing() -> int:
    """Return how many fds wait to be closed."""
    return _closer.waiting


def report_to(report: Callable[[Aborted], None]) -> None:
    """Report every later abort of a connection, in the thread that does it."""
    _closer.report = report


def abort_all() -> None:
    """Abort connections at the end of a process, which could not exit while a close waits.

    A close gets one second. Then the connection that it waits for is aborted, which takes at most one more second for
    each connection. If no close waits, it returns at once.
    """
    _closer.abort_all()

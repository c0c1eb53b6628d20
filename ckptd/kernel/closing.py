# SPDX-License-Identifier: LGPL-2.1-or-later
"""Closing file descriptors that came from somebody else.

close(2) asks the file system (FUSE_FLUSH), and that may be a program of whoever sent the fd, which never answers, not
even to SIGKILL. So each such close has a thread for itself. Half of all that may wait are not for one user to have, as
the other half would then be for everybody else: the servers that keep most of them waiting lose their connection. Below
that nobody does, since the file system may be a slow one of somebody honest.
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

MOST: Final = 256       # that wait for somebody's file system; while there are so many no fds are taken in
CROWD: Final = MOST // 2        # from so many on servers are given up
ROOM: Final = MOST // 4         # until fewer wait
PATIENCE: Final = 1.0   # seconds; who has answered each close by then is slow, and no more than that
# what /proc/self/fd says of files that no file system has a say in
_OURS: Final = ('pipe:', 'anon_inode:[pidfd]', 'pidfd:')


@dataclass(frozen=True, slots=True)
class Aborted:
    """A connection to a file server that was ended. device: as of `device_of`; closes: that waited for it."""
    device: int
    closes: int

    def __str__(self) -> str:
        return (f'the connection to the file server of device {self.device >> 20}:{self.device & 0xfffff} was aborted; '
                f'closes of clients\' files that it did not answer: {self.closes}')


@dataclass(slots=True)
class _Close:
    """One that waits. device: 0 while it is not known."""
    since: float
    device: int = 0


class _Closer:
    """Closes each fd in a thread that ends with it. report: called in any thread."""

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
        """The one thread that does it, as long as there is a crowd."""
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
        """End the connection that most closes wait for, of those of which one waits for longer than `age` seconds.
        False where none can be. vain: devices whose closes did not end by that, not to be tried again."""
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
        """Wait until fewer than that wait; False when the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._waiting) < bound, timeout)

    def _none_of(self, device: int, timeout: float) -> bool:
        """The same until none waits for that device."""
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
    # a daemon thread: the interpreter does not wait for it at its end
    threading.Thread(target=work, name='close', daemon=True).start()


def _close(fd: int) -> None:
    # an error would be that of a file system that is not ours (close(2), EIO)
    with contextlib.suppress(OSError):
        os.close(fd)


_closer = _Closer()


def close_foreign(fd: int) -> None:
    """Close without an error and without waiting, neither for a file system nor for what a socket has still to send, as
    its sender may have asked for (SO_LINGER, socket(7))."""
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
    """How many fds wait to be closed."""
    return _closer.waiting


def report_to(report: Callable[[Aborted], None]) -> None:
    """Have every connection that is aborted from now on told to somebody, in whichever thread does it."""
    _closer.report = report


def abort_all() -> None:
    """For the end of a process, which could not exit while a close waits. Where some still do after a second, whoever
    they wait for loses his connection. It blocks for a second, and for not more than another one per connection; no
    time at all where nothing waits."""
    _closer.abort_all()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify(7): watch a directory for changes."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ckptd.kernel.decl import c_int, c_uint, c_void_p, libc

# <sys/inotify.h>
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_Q_OVERFLOW = 0x4000
IN_ONLYDIR = 0x1000000

_EVENT = struct.Struct('iIII')      # struct inotify_event without its name


@libc
def inotify_init1(flags: c_int) -> c_int: ...


@libc
def inotify_add_watch(fd: c_int, pathname: c_void_p, mask: c_uint) -> c_int: ...


class Event(NamedTuple):
    """An event. name: '' if the event is about the watched directory itself, or is an overflow of the queue."""
    mask: int
    name: str


def parse_events(data: bytes) -> Iterator[Event]:
    """Parse the events of one read(2): whole structs, each followed by a name padded with NUL bytes."""
    at = 0
    while at < len(data):
        _, mask, _, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        yield Event(mask, os.fsdecode(data[at:at + length].rstrip(b'\0')))
        at += length


class Inotify:
    """An inotify descriptor, non-blocking; -1 once closed."""

    def __init__(self) -> None:
        self.fd = inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, path: Path, mask: int) -> None:
        inotify_add_watch(self.fd, os.fsencode(path), mask)

    def read(self) -> list[Event]:
        """Return the events since the last call; empty if there are none."""
        try:
            return list(parse_events(os.read(self.fd, 64 << 10)))
        except BlockingIOError:
            return []

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.close()

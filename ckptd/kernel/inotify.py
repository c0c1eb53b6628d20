# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify(7): watch files and directories for changes."""

import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from ckptd.kernel.decl import IOW, c_int, c_uint, c_void_p, libc
from ckptd.kernel.fdinfo import FdInfo
from ckptd.kernel.fhandle import FileHandle

# <linux/inotify.h>
IN_ACCESS = 0x1
IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_CLOSE_NOWRITE = 0x10
IN_OPEN = 0x20
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_Q_OVERFLOW = 0x4000
IN_ALL_EVENTS = 0xFFF
IN_ONLYDIR = 0x1000000
IN_DONT_FOLLOW = 0x2000000
IN_EXCL_UNLINK = 0x4000000
IN_ISDIR = 0x40000000
IN_ONESHOT = 0x80000000
# <linux/inotify.h>, since 4.16 with CONFIG_CHECKPOINT_RESTORE: the argument is the number that the next watch gets
INOTIFY_IOC_SETNEXTWD = IOW('I', 0, 4)

# A watch keeps these bits. The others of inotify_add_watch(2) have an effect only during the call, and before Linux
# 5.19 fdinfo shows bits of the kernel's own among them (fs/notify/inotify/inotify.h, inotify_mark_user_mask).
KEPT_BITS = IN_ALL_EVENTS | IN_EXCL_UNLINK | IN_ONESHOT
_EVENT = struct.Struct('iIII')      # struct inotify_event without its name


@libc
def inotify_init1(flags: c_int) -> c_int: ...


@libc
def inotify_add_watch(fd: c_int, pathname: c_void_p, mask: c_uint) -> c_int: ...


@libc
def inotify_rm_watch(fd: c_int, wd: c_int) -> c_int: ...


class InotifyWatch(NamedTuple):
    """A watch of an inotify instance, as fdinfo shows it."""
    wd: int
    mask: int               # IN_*; 0 for a watch that reports only the end of the file or of its file system
    device: int             # of the file system (st_dev), which is not st_dev of its files on btrfs and overlayfs
    inode: int
    handle: FileHandle      # type -1 where the kernel can make none


def parse_watch(row: str) -> InotifyWatch:
    """Parse the value of an 'inotify' line of fdinfo. All numbers are hexadecimal, also wd (fs/notify/fdinfo.c)."""
    fields = dict(field.split(':', 1) for field in row.split())
    device = int(fields['sdev'], 16)
    handle = FileHandle(int(fields.get('fhandle-type', '-1'), 16), bytes.fromhex(fields.get('f_handle', '')))
    return InotifyWatch(int(fields['wd'], 16), int(fields['mask'], 16) & KEPT_BITS,
                 os.makedev(device >> 20, device & 0xFFFFF), int(fields['ino'], 16), handle)


def watches_of(info: FdInfo) -> list[InotifyWatch]:
    """Return the watches of an inotify instance, by wd."""
    return sorted(parse_watch(row) for row in info.fields.get('inotify', ()))


def unread_bytes(fd: int) -> int:
    """Return the size of the events that wait to be read."""
    size = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, size)
    return int.from_bytes(size, 'little')


def set_watch(fd: int, file: int, mask: int) -> int:
    """Watch an open file, which may be an O_PATH one, and return the wd. A file that is watched already keeps its wd
    and gets this mask. OSError."""
    # inotify_add_watch(2) rejects a mask without any bit. A watch does not keep IN_ISDIR.
    return inotify_add_watch(fd, f'/proc/self/fd/{file}'.encode(), mask or IN_ISDIR)


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

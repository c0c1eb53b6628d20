# SPDX-License-Identifier: LGPL-2.1-or-later
"""fanotify(7): groups, their marks, and what fdinfo shows of both."""

import os
from typing import NamedTuple

from ckptd.kernel.decl import c_int, c_uint, c_void_p, libc, u64
from ckptd.kernel.fdinfo import FdInfo
from ckptd.kernel.fhandle import FileHandle
from ckptd.kernel.namei import AT_FDCWD

# <linux/fanotify.h>
FAN_MARK_ADD = 0x1
FAN_MARK_IGNORED_MASK = 0x20
FAN_MARK_INODE, FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM = 0x0, 0x10, 0x100
FAN_MARK_IGNORED_SURV_MODIFY, FAN_MARK_EVICTABLE, FAN_MARK_IGNORE = 0x40, 0x200, 0x400
FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS = 0x10000, 0x20000, 0x40000, 0x100000
PERMISSION_EVENTS = FAN_OPEN_PERM | FAN_ACCESS_PERM | FAN_OPEN_EXEC_PERM | FAN_PRE_ACCESS
MARK_FLAGS = FAN_MARK_IGNORED_SURV_MODIFY | FAN_MARK_EVICTABLE | FAN_MARK_IGNORE


@libc
def fanotify_init(flags: c_uint, event_f_flags: c_uint) -> c_int: ...


@libc
def _fanotify_mark(fd: c_int, flags: c_uint, mask: u64, dirfd: c_int, pathname: c_void_p) -> c_int: ...


class FanotifyGroup(NamedTuple):
    """A group. flags, event_flags: the arguments of fanotify_init(2)."""
    flags: int
    event_flags: int


class FanotifyMark(NamedTuple):
    """A mark, as fdinfo shows it."""
    on: int                 # FAN_MARK_INODE, FAN_MARK_MOUNT or FAN_MARK_FILESYSTEM
    flags: int              # MARK_FLAGS
    mask: int
    ignored: int            # FAN_MARK_IGNORED_MASK, or with FAN_MARK_IGNORE in `flags` its mask
    inode: int = 0
    device: int = 0         # of the file system
    mount: int = 0          # mnt_id
    handle: FileHandle = FileHandle(-1, b'')    # of an inode; type -1 where the kernel can make none


def group_of(info: FdInfo) -> FanotifyGroup:
    """Return the flags of a group, of its row 'flags:10 event-flags:0'."""
    row = next(row for row in info.fields['fanotify'] if row.startswith('flags:'))
    fields = _fields(row)
    return FanotifyGroup(int(fields['flags'], 16), int(fields['event-flags'], 16))


def marks_of(info: FdInfo) -> list[FanotifyMark]:
    """Return the marks of a group."""
    return [parse_mark(row) for row in info.fields['fanotify'] if not row.startswith('flags:')]


def parse_mark(row: str) -> FanotifyMark:
    """Parse a row of fdinfo. All numbers are hexadecimal (fs/notify/fdinfo.c, fanotify_fdinfo)."""
    fields = _fields(row)
    on = FAN_MARK_INODE if 'ino' in fields else FAN_MARK_MOUNT if 'mnt_id' in fields else FAN_MARK_FILESYSTEM
    device = int(fields.get('sdev', '0'), 16)
    handle = FileHandle(int(fields.get('fhandle-type', '-1'), 16), bytes.fromhex(fields.get('f_handle', '')))
    return FanotifyMark(on, int(fields['mflags'], 16), int(fields['mask'], 16), int(fields['ignored_mask'], 16),
                        int(fields.get('ino', '0'), 16), os.makedev(device >> 20, device & 0xFFFFF),
                        int(fields.get('mnt_id', '0'), 16), handle)


def _fields(row: str) -> dict[str, str]:
    return {name: value for name, _, value in (field.partition(':') for field in row.split())}


def set_mark(group: int, mark: FanotifyMark, file: int) -> None:
    """Mark an open file, which may be an O_PATH one, or its mount or file system. OSError."""
    path = f'/proc/self/fd/{file}'.encode()
    add = FAN_MARK_ADD | mark.on | mark.flags & FAN_MARK_EVICTABLE
    if mark.mask:
        _fanotify_mark(group, add, mark.mask, AT_FDCWD, path)
    if mark.ignored:
        how = mark.flags & FAN_MARK_IGNORE or FAN_MARK_IGNORED_MASK
        _fanotify_mark(group, add | how | mark.flags & FAN_MARK_IGNORED_SURV_MODIFY, mark.ignored, AT_FDCWD, path)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copy between two files inside the kernel: share blocks if the file system can (ioctl_ficlonerange(2)), else
copy_file_range(2), else sendfile(2)."""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from ckptd.kernel.decl import IOW, c_int, c_long, libc

_CLONE_RANGE = struct.Struct('=qQQQ')       # struct file_clone_range of <linux/fs.h>
FICLONERANGE = IOW('\x94', 13, _CLONE_RANGE.size)

_MOST = 1 << 30      # bytes per call, so that signals are handled in between
_ZEROS = 1 << 20
# different file systems, a file system without support, special files, an unaligned range
_NOT_SO = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EBADF, errno.EPERM,
           errno.ETXTBSY)


def clone_range(source: int, start: int, length: int, target: int, offset: int) -> bool:
    """Share the blocks. Return False if that is not possible. OSError for a full or broken disk."""
    try:
        fcntl.ioctl(target, FICLONERANGE, _CLONE_RANGE.pack(source, start, length, offset))
    except OSError as error:
        if error.errno not in _NOT_SO:
            raise
        return False
    return True


def copy_range(source: int, start: int, length: int, target: int, offset: int) -> int:
    """Copy bytes and return their number, which is less than `length` if the source ends before.

    target must not be O_APPEND, and its position may move.
    """
    if length and clone_range(source, start, length, target, offset):
        return length
    done = 0
    while done < length:
        count = _copy(source, start + done, min(_MOST, length - done), target, offset + done)
        if not count:
            break
        done += count
    return done


def _copy(source: int, start: int, length: int, target: int, offset: int) -> int:
    try:
        return os.copy_file_range(source, target, length, start, offset)
    except OSError as error:
        if error.errno not in _NOT_SO:
            raise
    os.lseek(target, offset, os.SEEK_SET)
    return os.sendfile(target, source, start, length)


# <linux/falloc.h>
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2


@libc
def fallocate(fd: c_int, mode: c_int, offset: c_long, len: c_long) -> c_int: ...


def zero_range(fd: int, start: int, end: int) -> None:
    """Make a hole, or write zeros if the file system has no holes."""
    try:
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, end - start)
        return
    except OSError as error:
        if error.errno not in _NOT_SO:
            raise
    while start < end:
        start += os.pwrite(fd, bytes(min(_ZEROS, end - start)), start)


def copy_with_holes(source: int, start: int, length: int, target: int, offset: int) -> int:
    """Copy like copy_range. A hole of the source becomes a hole of the target, whatever was there."""
    if length and clone_range(source, start, length, target, offset):
        return length
    at, end = start, max(min(start + length, os.fstat(source).st_size), start)
    for data, stop in data_ranges(source, end, start):
        _make_hole(target, offset + at - start, offset + data - start)
        copy_range(source, data, stop - data, target, offset + data - start)
        at = stop
    _make_hole(target, offset + at - start, offset + end - start)
    return end - start


def data_bytes(fd: int, start: int, end: int) -> int:
    """Return how many bytes of [start, end) are not in a hole (lseek(2))."""
    return sum(stop - data for data, stop in data_ranges(fd, min(end, os.fstat(fd).st_size), start))


def data_ranges(fd: int, end: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield the ranges of [start, end) that are not in a hole (lseek(2))."""
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
            stop = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:      # only a hole up to the end
                return
            if error.errno != errno.EINVAL:     # a file system without holes
                raise
            data, stop = at, end
        if data >= end:
            return
        yield data, stop
        at = stop


def _make_hole(fd: int, start: int, end: int) -> None:
    size = os.fstat(fd).st_size
    if start < min(end, size):
        zero_range(fd, start, min(end, size))

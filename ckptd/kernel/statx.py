# SPDX-License-Identifier: LGPL-2.1-or-later
"""The type and device of an open file without a request to its file system: statx(2) with AT_STATX_DONT_SYNC answers
from memory, while fstat(2) may wait for a file server that never answers."""

import contextlib
import ctypes
import os
import stat
from typing import Annotated

from ckptd.kernel.decl import c_int, c_uint, c_void_p, cstruct, libc, u16, u32, u64

AT_EMPTY_PATH = 0x1000          # <linux/fcntl.h>
AT_STATX_DONT_SYNC = 0x4000
STATX_TYPE = 1                  # <linux/stat.h>


@cstruct(size=256)
class statx_buf(ctypes.Structure):
    """struct statx of <linux/stat.h>; only mode and device are read."""
    stx_mask: u32
    stx_blksize: u32
    stx_attributes: u64
    stx_nlink: u32
    stx_uid: u32
    stx_gid: u32
    stx_mode: u16
    between: Annotated[object, ctypes.c_uint16 * 53]
    stx_dev_major: u32
    stx_dev_minor: u32
    rest: Annotated[object, ctypes.c_uint16 * 56]


@libc
def statx(dirfd: c_int, path: c_void_p, flags: c_int, mask: c_uint, buf: c_void_p) -> c_int: ...


def _statx(fd: int, mask: int) -> statx_buf:
    """Call statx(2). The result is all zeros if nothing is known."""
    buf = statx_buf()
    with contextlib.suppress(OSError):
        statx(fd, b'', AT_EMPTY_PATH | AT_STATX_DONT_SYNC, mask, ctypes.byref(buf))
    return buf


def file_type(fd: int) -> int:
    """Return S_IFMT of the open file, 0 if unknown."""
    return stat.S_IFMT(_statx(fd, STATX_TYPE).stx_mode)


def device_of(fd: int) -> int:
    """Return the device of the open file's file system in the kernel's form (MAJOR << 20 | MINOR, linux/kdev_t.h), 0 if
    unknown."""
    # no attribute is requested: then FUSE answers even users to whom the file system's owner denies access
    # (fuse_getattr() of fs/fuse)
    buf = _statx(fd, 0)
    return buf.stx_dev_major << 20 | buf.stx_dev_minor


def is_socket_or_pipe(fd: int) -> bool:
    """Whether the file is a socket, a pipe or a FIFO."""
    return file_type(fd) in (stat.S_IFSOCK, stat.S_IFIFO)


def is_terminal(fd: int) -> bool:
    """Whether the file is a terminal (isatty(3)). Only a character device is asked: for a regular file the request
    would go to its file system."""
    return file_type(fd) == stat.S_IFCHR and os.isatty(fd)

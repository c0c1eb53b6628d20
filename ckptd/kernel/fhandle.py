# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files by their handles (open_by_handle_at(2)), which requires CAP_DAC_READ_SEARCH."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_long, c_void_p, syscall
from ckptd.kernel.namei import AT_FDCWD

_HEAD = struct.Struct('=Ii')        # struct file_handle of <linux/fs.h> without its bytes


class FileHandle(NamedTuple):
    """A file handle. type: of the file system, FILEID_* of include/linux/exportfs.h."""
    type: int
    data: bytes


@syscall(NR['open_by_handle_at'])
def _open_by_handle_at(mount_fd: c_int, handle: c_void_p, flags: c_int) -> c_long: ...


@contextmanager
def working_directory(fd: int) -> Iterator[None]:
    """Work in this directory, which may be open with O_PATH, during the block. For a process of one thread."""
    before = os.open('.', os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchdir(fd)
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def open_handle_here(handle: FileHandle) -> int:
    """Open a file on the mount of the working directory, with O_PATH. ESTALE or EOPNOTSUPP if the file system cannot
    find files by their handles.

    The call rejects an O_PATH fd for the mount. Any other fd would have to be opened, and programs that watch that
    directory would see this.
    """
    packed = _HEAD.pack(len(handle.data), handle.type) + handle.data
    return _open_by_handle_at(AT_FDCWD, packed, os.O_PATH | os.O_CLOEXEC)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that a restart makes and changes, and how that is undone: by a process of one thread, in no sandbox."""

import errno
import os
from contextlib import suppress

from ckptd.journal.steps import KeepFile, MakeFile
from ckptd.kernel.copyrange import copy_with_holes
from ckptd.kernel.creds import file_rights

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def keep(fd: int, start: int, kept: int) -> None:
    """Copy what a file has from `start` on into an empty one, holes as holes; shared where the file system can."""
    length = max(os.fstat(fd).st_size - start, 0)
    if copy_with_holes(fd, start, length, kept, 0) < length:
        raise OSError(errno.EIO, 'it became shorter while it was copied')
    os.ftruncate(kept, length)


def put_back(step: KeepFile) -> None:
    """Make a file what it was when it was kept. One that has another inode by now is somebody else's new one."""
    try:
        with file_rights(step.uid, step.gid, step.groups):
            fd = os.open(step.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    try:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (step.device, step.inode):
            return
        kept = os.open(step.kept, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            copy_with_holes(kept, 0, max(step.size - step.start, 0), fd, step.start)
        finally:
            os.close(kept)
        os.ftruncate(fd, step.size)
        os.utime(fd, ns=(found.st_atime_ns, step.mtime))
    finally:
        os.close(fd)


def unmake(step: MakeFile) -> None:
    """Unlink a file, by the rights that it was made with."""
    with file_rights(step.uid, step.gid, step.groups), suppress(FileNotFoundError, NotADirectoryError):
        found = os.lstat(step.path)
        if not step.inode or (found.st_dev, found.st_ino) == (step.device, step.inode):
            os.unlink(step.path)  # noqa: PTH108

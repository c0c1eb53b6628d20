# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files and segments that a restart makes and changes, and how that is undone: with the rights of who made them."""

import errno
import os
import warnings
from collections.abc import Callable
from contextlib import suppress

from ckptd.journal.steps import KeepFile, MakeFile, MakeSegment
from ckptd.kernel.copyrange import copy_with_holes, data_bytes
from ckptd.kernel.creds import become
from ckptd.kernel.shm import shmctl_remove, shmctl_stat

_PIECE = 64 << 20       # bytes
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def keep(fd: int, start: int, kept: int, room: Callable[[int], None] = lambda size: None) -> None:
    """Copy what a file has from `start` on into an empty one, holes as holes; shared where the file system can.

    room(n) is called before up to n bytes are written, first of all for the whole; it raises where they do not fit. The
    file may get more content meanwhile, so it is asked again for each piece."""
    length = max(os.fstat(fd).st_size - start, 0)
    room(data_bytes(fd, start, start + length))
    for at in range(0, length, _PIECE):
        piece = min(_PIECE, length - at)
        if at:
            room(data_bytes(fd, start + at, start + at + piece))
        if copy_with_holes(fd, start + at, piece, kept, at) < piece:
            raise OSError(errno.EIO, 'it became shorter while it was copied')
    os.ftruncate(kept, length)


def put_back(step: KeepFile, kept: int) -> None:
    """Make a file what it was when it was kept, by the rights that we have. kept: the content, open for reading. A file
    that has another inode by now is left alone: it is a new one."""
    try:
        fd = os.open(step.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _GONE:
            return
        raise
    try:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (step.device, step.inode):
            return
        copy_with_holes(kept, 0, max(step.size - step.start, 0), fd, step.start)
        os.ftruncate(fd, step.size)
        with suppress(PermissionError):     # the owner's right, and a writer need not be the owner
            os.utime(fd, ns=(found.st_atime_ns, step.mtime))
    finally:
        os.close(fd)


def unmake(step: MakeFile) -> None:
    """Unlink a file, by the rights that we have."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.lstat(step.path)
        if not step.inode or (found.st_dev, found.st_ino) == (step.device, step.inode):
            os.unlink(step.path)  # noqa: PTH108


def remove_segment(step: MakeSegment) -> None:
    """Remove a System V segment, by the rights that we have, if it is the one that was made."""
    try:
        found = shmctl_stat(step.shmid)
        if (found.key, found.size, found.cuid) == (step.key, step.size, step.uid):
            shmctl_remove(step.shmid)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EIDRM):      # gone by itself
            raise


def as_maker(step: MakeFile | KeepFile | MakeSegment, work: Callable[[], None]) -> None:
    """Do the work by the rights that the step was taken with: as root in a child that becomes that user and has no
    capability. The OSError of the child is ours."""
    if step.uid == os.geteuid():
        work()
        return
    pid = _fork()
    if pid == 0:
        _as_user(step, work)
    _, status = os.waitpid(pid, 0)
    number = os.WEXITSTATUS(status) if os.WIFEXITED(status) else errno.EINTR
    if number:
        raise OSError(number, os.strerror(number))


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads, for locks that they may hold; the child takes none
        warnings.simplefilter('ignore', DeprecationWarning)
        return os.fork()


def _as_user(step: MakeFile | KeepFile | MakeSegment, work: Callable[[], None]) -> None:
    status = errno.EIO
    try:
        become(step.uid, step.gid, step.groups, 0)
        work()
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    finally:
        os._exit(status)

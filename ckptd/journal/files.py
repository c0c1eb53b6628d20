# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files and segments that a restart makes and changes. They are undone with the rights of the user who made them."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from ckptd.journal.steps import KeepFile, LinkFile, MakeFile, MakeSegment, WalkQueues
from ckptd.kernel.copyrange import copy_with_holes, data_bytes
from ckptd.kernel.creds import become
from ckptd.kernel.fork import quiet_fork
from ckptd.kernel.shm import shmctl_remove, shmctl_stat

_PIECE = 64 << 20       # bytes
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def keep(fd: int, start: int, kept: int, room: Callable[[int], None] = lambda size: None) -> None:
    """Copy a file's content from `start` on into an empty file. Holes stay holes, and blocks are shared where possible.

    room(n) is called before up to n bytes are written, first for the whole; it raises if they do not fit. The file may
    grow meanwhile, so it is called again for each piece.
    """
    length = max(os.fstat(fd).st_size - start, 0)
    room(data_bytes(fd, start, start + length))
    for at in range(0, length, _PIECE):
        piece = min(_PIECE, length - at)
        if at:
            room(data_bytes(fd, start + at, start + at + piece))
        if copy_with_holes(fd, start + at, piece, kept, at) < piece:
            raise OSError(errno.EIO, 'the file became shorter while it was copied')
    os.ftruncate(kept, length)


def put_back(step: KeepFile, kept: int) -> None:
    """Restore a file to its kept state, with the rights of this process. kept: the content, open for reading. A file
    that has another inode by now is a new file and is left alone."""
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
        with suppress(PermissionError):     # the right of the owner, and the writer need not be the owner
            os.utime(fd, ns=(found.st_atime_ns, step.mtime))
    finally:
        os.close(fd)


def unmake(step: MakeFile | LinkFile) -> None:
    """Unlink a file with the rights of this process."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.lstat(step.path)
        if not step.inode or (found.st_dev, found.st_ino) == (step.device, step.inode):
            os.unlink(step.path)  # noqa: PTH108


def remove_segment(step: MakeSegment) -> None:
    """Remove a System V segment with the rights of this process, if it is still the one that was made."""
    try:
        found = shmctl_stat(step.shmid)
        if (found.key, found.size, found.cuid) == (step.key, step.size, step.uid):
            shmctl_remove(step.shmid)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EIDRM):      # it is gone already
            raise


def as_maker(step: MakeFile | KeepFile | LinkFile | MakeSegment | WalkQueues, work: Callable[[], None]) -> None:
    """Do the work with the rights with which the step was taken. Root does it in a child that becomes that user and has
    no capability. An OSError of the child is raised here."""
    if step.uid == os.geteuid():
        work()
        return
    pid = quiet_fork()
    if pid == 0:
        _as_user(step, work)
    _, status = os.waitpid(pid, 0)
    number = os.WEXITSTATUS(status) if os.WIFEXITED(status) else errno.EINTR
    if number:
        raise OSError(number, os.strerror(number))


def _as_user(step: MakeFile | KeepFile | LinkFile | MakeSegment | WalkQueues, work: Callable[[], None]) -> None:
    status = errno.EIO
    try:
        become(step.uid, step.gid, step.groups, 0)
        work()
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    finally:
        os._exit(status)

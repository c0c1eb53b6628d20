# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps that make, change and name files. They are undone with the rights of the user who took them."""

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from ckptd.journal.steps.base import Count, Lifetime, Moved, Path, Step, StepContext
from ckptd.journal.steps.rights import as_maker
from ckptd.kernel.copyrange import copy_with_holes, data_bytes

_PIECE = 64 << 20       # bytes
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class MakeFile(Step, frozen=True):
    """Make a file with the rights of a user. It is undone by unlinking it."""
    point = 'make-file'
    by_user = True
    path: Path
    device: Count
    inode: Count    # unlink the file only while it has this inode; 0 for a name that only ckptd can have given
    uid: Count
    gid: Count
    groups: tuple[Count, ...]

    @property
    def lifetime(self) -> Lifetime:
        """A file that only the journal names is not needed any more when the tree lives."""
        return Lifetime.TREE if self.inode else Lifetime.JOB

    @property
    def makes(self) -> str:
        return self.path

    def describe(self) -> str:
        return f'making file {self.path}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        as_maker(self, partial(_unlink, self.path, self.device, self.inode))


class KeepFile(Step, frozen=True):
    """Write to an existing file with the rights of a user. Its bytes from `start` on are in the file `kept`, and the
    step is undone by putting them back."""
    point = 'keep-file'
    by_user = True
    lifetime = Lifetime.TREE
    path: Path
    device: Count
    inode: Count
    size: Count
    mtime: Count    # nanoseconds
    start: Count
    kept: Path
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The only copy of the file's content."""
        return (self.kept,)

    def describe(self) -> str:
        return f'rolling back {self.path}, whose content is in {self.kept}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        kept = os.open(self.kept, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            as_maker(self, partial(self._put_back, kept))
        finally:
            os.close(kept)

    def _put_back(self, kept: int) -> None:
        """Restore the file to its kept state, with the rights of this process. kept: the content, open for reading. A
        file that has another inode by now is a new file and is left alone."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _GONE:
                return
            raise
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) != (self.device, self.inode):
                return
            copy_with_holes(kept, 0, max(self.size - self.start, 0), fd, self.start)
            os.ftruncate(fd, self.size)
            with suppress(PermissionError):     # the right of the owner, and the writer need not be the owner
                os.utime(fd, ns=(found.st_atime_ns, self.mtime))
        finally:
            os.close(fd)


class LinkFile(Step, frozen=True):
    """A name that a checkpoint gives to a deleted file with the rights of a user.

    The undo unlinks the name if it still is that file. If the directory `image` of the image that needs the name
    exists, the name stays.
    """
    point = 'link-file'
    by_user = True
    lifetime = Lifetime.IMAGE
    path: Path
    device: Count
    inode: Count
    image: Path
    uid: Count
    gid: Count
    groups: tuple[Count, ...]

    def describe(self) -> str:
        return f'giving a deleted file the name {self.path}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        if not os.path.lexists(self.image):      # if it exists, the image is published and has the name
            as_maker(self, partial(_unlink, self.path, self.device, self.inode))


def keep(fd: int, start: int, kept: int, room: Callable[[int], None] = lambda size: None) -> None:
    """Copy a file's content from `start` on into an empty file, for KeepFile. Holes stay holes, and blocks are shared
    where possible.

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


def _unlink(path: str, device: int, inode: int) -> None:
    """Unlink a file with the rights of this process, while it has this inode; in any case if that is 0."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = os.lstat(path)
        if not inode or (found.st_dev, found.st_ino) == (device, inode):
            os.unlink(path)  # noqa: PTH108

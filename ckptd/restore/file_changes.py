# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files outside of the image that a restart makes and changes. Each is in the journal, in case the restart fails."""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path, PurePath

from ckptd.errors import CkptError
from ckptd.faults import fault
from ckptd.image.files import require_room
from ckptd.journal.steps import BindSocket, KeepFile, MakeFile
from ckptd.journal.steps.files import keep
from ckptd.kernel.unix import is_dead
from ckptd.restore.cgroups import Placement
from ckptd.restore.file_rights import FileRights

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FileChanges:
    """Changes to files.

    rights: of the owner of new files. rights_to(path): the rights with which an existing file was opened. place: has
    the journal, and makes files in the spool. keep_free: bytes of the spool's file system that must stay free, whatever
    is kept there.
    """

    def __init__(self, place: Placement, rights: FileRights, rights_to: Callable[[str], FileRights],
                 keep_free: int = 0) -> None:
        self._place, self._rights, self._rights_to, self._note = place, rights, rights_to, place.note
        self._keep_free = keep_free

    def keep(self, path: str, fd: int, start: int) -> None:
        """Keep content as objects.files.restoring.FileMaking.keep does. SpoolFailed if too little of the spool would
        stay free."""
        fault('place-keep-file')
        kept, copy = self._place.keep_content()
        try:
            keep(fd, start, copy, lambda size: require_room(Path(kept), size, self._keep_free, at=copy, phase='start'))
        finally:
            os.close(copy)
        of = os.fstat(fd)
        self._note(KeepFile(path, of.st_dev, of.st_ino, of.st_size, max(of.st_mtime_ns, 0), start, kept,
                            *self._rights_to(path)))
        fault('place-keep-file-done')

    def make(self, path: str, fill: Callable[[int], None]) -> None:
        """Make a file as objects.files.restoring.FileMaking.make_file does."""
        temporary = _beside(path)
        fault('place-make-file')
        self._note(self._made(temporary, 0, 0))
        with self._rights.taken():
            fd = os.open(temporary, _NEW, 0o600)
        try:
            fill(fd)
            of = os.fstat(fd)
        finally:
            os.close(fd)
        self._note(self._made(path, of.st_dev, of.st_ino))
        with self._rights.taken():
            os.link(temporary, path)
            os.unlink(temporary)  # noqa: PTH108
        fault('place-make-file-done')

    def open_linked(self, link: str, path: str, open_: Callable[[str], int]) -> int:
        """Open a linked file, see objects.files.restoring.FileMaking.open_linked."""
        with self._rights.taken():
            of = os.lstat(link)
        try:
            path.encode()
            fault('place-open-linked')
            self._note(self._made(path, of.st_dev, of.st_ino))
            with self._rights.taken():
                os.link(link, path, follow_symlinks=False)
        except (UnicodeEncodeError, FileExistsError):
            return open_(link)
        try:
            return open_(path)
        finally:
            with self._rights.taken():
                os.unlink(path)  # noqa: PTH108
            fault('place-open-linked-done')

    def bind(self, path: str, bind: Callable[[], None]) -> int:
        """Bind a socket as objects.files.restoring.FileMaking.bind does."""
        aside = _beside(path)
        fault('place-bind-socket')
        with self._rights.taken():
            old = os.lstat(path) if os.path.lexists(path) else None
            if old and not (stat.S_ISSOCK(old.st_mode) and is_dead(path)):
                raise FileExistsError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
        self._note(self._made(aside, 0, 0))     # undone after the next one, which may give it its name again
        self._note(BindSocket(path, aside, old.st_dev if old else 0, old.st_ino if old else 0, *self._rights))
        with self._rights.taken():
            if old:
                os.rename(path, aside)  # noqa: PTH104
            bind()
            fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        of = os.fstat(fd)
        if not stat.S_ISSOCK(of.st_mode) or of.st_uid != self._rights.uid:
            os.close(fd)
            raise CkptError(f'{path} was replaced while it was made again', errno=errno.ESTALE, resource=path,
                            hint='find out which other program writes in its directory')
        self._note(self._made(path, of.st_dev, of.st_ino))
        fault('place-bind-socket-done')
        return fd

    def _made(self, path: str, device: int, inode: int) -> MakeFile:
        return MakeFile(path, device, inode, *self._rights)


def _beside(path: str) -> str:
    """Return a new name in the same directory, which only ckptd can give."""
    pure = PurePath(path)
    return str(pure.with_name(f'.{pure.name[:200]}.{secrets.token_hex(8)}'))

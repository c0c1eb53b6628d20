# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files outside of the image that a restart makes and changes. Each is in the journal, in case the restart fails."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path, PurePath

from ckptd.faults import fault
from ckptd.image.files import require_room
from ckptd.journal.steps import KeepFile, MakeFile
from ckptd.journal.steps.files import keep
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
        pure = PurePath(path)
        temporary = str(pure.with_name(f'.{pure.name[:200]}.{secrets.token_hex(8)}'))
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

    def _made(self, path: str, device: int, inode: int) -> MakeFile:
        return MakeFile(path, device, inode, *self._rights)

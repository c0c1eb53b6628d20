# SPDX-License-Identifier: LGPL-2.1-or-later
"""Access to the files of this machine for a restart, with the rights that apply to the files of an image."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress

from ckptd.image.reader import ImageReader
from ckptd.image.records import Extent
from ckptd.inspect.checks import CallerRights
from ckptd.kernel.namei import open_direct
from ckptd.kernel.shm import ShmidDs
from ckptd.objects.files.base import ChangedFiles, InheritedFiles
from ckptd.objects.files.registry import Kinds
from ckptd.restore.file_rights import FileRights, is_users, rights_for
from ckptd.restore.procfs_paths import OutOfReach, open_within_reach, require_reach

_ENTER_AND_WRITE = os.W_OK | os.X_OK


class FileAccess:
    """The file access of kinds, see objects.files.base.FileLookup. Paths of an image are those of our own mount
    namespace.

    rights: used for all access, before the restart and during it. by_root: where they are not sufficient, root's are
    used, with a path without symbolic links.
    """

    def __init__(self, reader: ImageReader, caller: CallerRights, changed_files: ChangedFiles,
                 terminal_fd: int, inherited: InheritedFiles, *, detach_terminal: bool = False) -> None:
        self._reader, self._caller, self.rights = reader, caller, rights_for(reader, caller)
        self.by_root = is_users(reader, caller)
        self.changed_files, self.terminal_fd = changed_files, terminal_fd
        self.terminal, self.detach_terminal = terminal_fd >= 0, detach_terminal
        self.inherited = inherited
        self.kinds = Kinds()
        self._pids: Mapping[int, int] = {}

    @property
    def uid(self) -> int:
        return self.rights.uid

    def may_own(self, uid: int, gid: int) -> bool:
        return self.rights.may_own(uid, gid)

    def capable(self, capability: int) -> bool:
        mask = self._caller.capabilities
        # unknown: all for root, none for other users
        return bool(mask >> capability & 1) if mask >= 0 else not self._caller.uid

    def as_user(self) -> AbstractContextManager[object]:
        return self.rights.taken()

    def lstat(self, path: str) -> os.stat_result | None:
        with suppress(OSError, ValueError), self.rights.taken():
            return os.lstat(path)
        if self.by_root:
            with suppress(OSError, ValueError):
                return os.lstat(path)
        return None

    def may(self, path: str, access: int) -> bool:
        with self.rights.taken():
            # with AT_EACCESS faccessat2(2) uses the file-system ids (fs/open.c, do_faccessat)
            if os.access(path, access, effective_ids=True):
                return True
        # nothing is made in a directory with rights that are not the user's
        return self.by_root and access & _ENTER_AND_WRITE != _ENTER_AND_WRITE and _may_directly(path, access)

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        fd = self._opened(path, flags, mode)
        try:
            require_reach(fd, path, self.rights, self._pids)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _opened(self, path: str, flags: int, mode: int) -> int:
        try:
            with self.rights.taken(needed := self._needed_for(path)):
                # a path with a link may lead anywhere, and these rights pass every directory
                return open_direct(path, flags, mode) if needed else open_within_reach(path, flags, mode)
        except PermissionError:
            if not self.by_root:
                raise
        return open_direct(path, flags, mode)

    def out_of_reach(self, path: str, flags: int = 0) -> str:
        """Return why the user's rights cannot open a path, whatever is there; '' if nothing prevents it. flags: with
        O_NOFOLLOW, a symbolic link itself is opened."""
        try:
            with self.rights.taken():
                fd = open_within_reach(path, os.O_PATH | flags & os.O_NOFOLLOW)
            try:
                require_reach(fd, path, self.rights, self._pids)
            finally:
                os.close(fd)
        except OutOfReach as error:
            return error.reason
        except OSError:
            return ''       # its kind reports that
        return ''

    def may_take(self, found: ShmidDs) -> bool:
        """Whether a System V segment that still exists may be taken over and filled."""
        return self.by_root or self.rights.owns(found) or self.rights.may_write(found)

    def owns(self, found: ShmidDs) -> bool:
        return self.by_root or self.rights.owns(found)

    def rights_to(self, path: str) -> FileRights:
        """Return the rights with which a file may be read and written, for a later undo."""
        with self.rights.taken():
            own = os.access(path, os.R_OK | os.W_OK, effective_ids=True)
        return self.rights if own or not self.by_root else FileRights(os.geteuid(), os.getegid(), ())

    def _needed_for(self, path: str) -> int:
        """Return the capabilities needed to open it, as a mask."""
        return 0

    def pread(self, extent: Extent, length: int, offset: int) -> bytes:
        data = bytearray(max(min(length, extent.length - offset), 0))
        self._reader.pread_into(memoryview(data), extent.part, extent.offset + offset)
        return bytes(data)


def _may_directly(path: str, access: int) -> bool:
    try:
        fd = open_direct(path, os.O_PATH)
    except OSError:
        return False
    try:
        return os.access(f'/proc/self/fd/{fd}', access)
    finally:
        os.close(fd)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""An open directory, kept by name."""

import os
import stat

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.objects.files.base import (
    Content,
    FileLookup,
    Kind,
    OpenFile,
    RestoreContext,
    finding,
    of_process,
    open_again,
    opening,
)
from ckptd.objects.files.dead_process import is_of_dead_process
from ckptd.objects.files.deleted import deleted_findings, removed_directory
from ckptd.objects.files.hidden import hidden_findings
from ckptd.objects.files.locks import Lock, lock_findings, read_locks, restore_locks
from ckptd.objects.support import Support


@layout
class Directory(Struct):
    """An open directory."""
    path: str           # from the root of the mount namespace
    device: U64
    inode: U64
    mode: U32
    locks: tuple[Lock, ...]
    deleted: U8 = 0     # it was removed, and no entries can be added to it


class DirectoryKind(Kind[Directory], tag='directory'):
    support = Support('directories', dumped='name', refused='those of mounts that are not attached',
                      user='the directory must be accessible')

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISDIR(file.stat.st_mode) and not file.is_path and not is_of_dead_process(file)

    def findings(self, file: OpenFile) -> list[Finding]:
        return hidden_findings(file, 'directory')

    def dump(self, file: OpenFile, content: Content) -> Directory:
        of = file.stat
        return Directory(file.path, of.st_dev, of.st_ino, of.st_mode, read_locks(file), file.deleted)

    def late(self, record: Directory, saved: SavedFile) -> bool:
        return of_process(record.path)

    def restart_findings(self, record: Directory, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if self.late(record, saved):
            return []       # its process is not yet made
        if record.deleted:
            return deleted_findings(record.path, lookup)
        found = lookup.lstat(record.path)
        if found is None:
            return [finding('ENOENT', f'{record.path} is missing', 'make the directory again')]
        if not stat.S_ISDIR(found.st_mode):
            return [finding('ENOTDIR', f'{record.path} is no longer a directory', 'put the directory back')]
        if not lookup.may(record.path, os.R_OK):
            return [finding('EACCES', f'{record.path} is not readable', 'run as its owner, or as root')]
        rows = lock_findings(record.locks, record.path, lookup)
        if found.st_ino != record.inode:
            rows += [finding('ESTALE', f'{record.path} is another directory (inode {found.st_ino}, not {record.inode})',
                             'a listing that was under way may skip or repeat names', 'warning')]
        return rows

    def create(self, record: Directory, saved: SavedFile, ctx: RestoreContext) -> int:
        flags = opening(saved.flags) | os.O_NONBLOCK
        if record.deleted:
            return open_again(removed_directory(record.path, record.mode, ctx), flags | os.O_DIRECTORY)
        fd = ctx.open(record.path, flags)
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise CkptError(f'{record.path} is no longer a directory', resource=record.path)
        return fd

    def connect(self, record: Directory, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        restore_locks(record.locks, record.path, saved, fd, ctx)

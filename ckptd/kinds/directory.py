# SPDX-License-Identifier: LGPL-2.1-or-later
"""An open directory, kept by name."""

import stat

from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.kinds.base import Content, Kind, OpenFile, Reason
from ckptd.kinds.locks import Lock, read_locks


@layout
class Directory(Struct):
    """path: from the root of the mount namespace."""
    path: str
    device: U64
    inode: U64
    mode: U32
    locks: tuple[Lock, ...]


class DirectoryKind(Kind[Directory], tag='directory'):

    def matches(self, file: OpenFile) -> bool:
        return stat.S_ISDIR(file.stat.st_mode) and not file.is_path

    def refusals(self, file: OpenFile) -> list[Reason]:
        if file.deleted:
            # a deleted directory is empty and takes no new entries; no call makes one
            return [Reason('ENOENT', f'{file.path} is a deleted directory', 'let the program leave it first')]
        if not file.reachable:
            return [Reason('ENOENT', f'{file.path} is another directory now, or covered by a mount',
                           'a restart opens directories by path: uncover the mount', 'warning')]
        return []

    def dump(self, file: OpenFile, content: Content) -> Directory:
        of = file.stat
        return Directory(file.path, of.st_dev, of.st_ino, of.st_mode, read_locks(file))

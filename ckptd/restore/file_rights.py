# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rights with which the files of an image are opened: file-system ids and groups, perhaps of another user.

    an ordinary user restores an own image  that user's
    root restores an image of root          root's
    ... of a tree that is all a user's      that user's, else root's with a path without symbolic links: a service has
                                            its log opened before it gives up its rights
    root restores an image of a user        that user's

The reason for the last two: the owner of a directory decides where a path through it leads. They may replace a
directory by a symbolic link, and with root's rights their own processes would come back with a file of root. A path
that /proc shows of an open file has no links.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

from ckptd.image.reader import ImageReader
from ckptd.image.records import Credentials
from ckptd.inspect.checks import CallerRights
from ckptd.kernel.creds import file_rights
from ckptd.kernel.shm import ShmidDs

_EFFECTIVE = 1      # index into Credentials.uids and gids


class FileRights(NamedTuple):
    """A user as the file system and System V IPC see one."""
    uid: int
    gid: int
    groups: tuple[int, ...]

    def taken(self, capabilities: int = 0) -> AbstractContextManager[None]:
        """Look up and make files as that user in this block, see ckptd.kernel.creds.file_rights."""
        return file_rights(self.uid, self.gid, self.groups, capabilities)

    def may_own(self, uid: int, gid: int) -> bool:
        """Whether that user may give a new file this owner and group (chown(2))."""
        return not self.uid or (uid == self.uid and gid in (self.gid, *self.groups))

    def owns(self, found: ShmidDs) -> bool:
        """Whether that user may give the segment another owner and mode (shmctl(2), IPC_SET)."""
        return self.uid in (0, found.uid, found.cuid)

    def may_write(self, found: ShmidDs) -> bool:
        """Whether that user may attach the segment for reading and writing (ipcperms() in ipc/util.c)."""
        if self.uid in (found.uid, found.cuid):
            bits = found.mode >> 6
        else:
            bits = found.mode >> 3 if {found.gid, found.cgid} & {self.gid, *self.groups} else found.mode
        return not self.uid or bits & 6 == 6


def rights_of(caller: CallerRights) -> FileRights:
    return FileRights(caller.uid, caller.gid, tuple(caller.groups))


def is_users(reader: ImageReader, caller: CallerRights) -> bool:
    """Whether root restores an image of root whose processes belong to a user. ImageDamaged."""
    if caller.uid or reader.manifest.owner_uid:
        return False
    uids = set(reader.get(Credentials, reader.manifest.root).uids)
    return len(uids) == 1 and 0 not in uids


def rights_for(reader: ImageReader, caller: CallerRights) -> FileRights:
    """Return the rights by the table above. ImageDamaged."""
    manifest = reader.manifest
    if is_users(reader, caller):
        root = reader.get(Credentials, manifest.root)
        return FileRights(root.uids[_EFFECTIVE], root.gids[_EFFECTIVE], tuple(root.groups))
    if caller.uid or not manifest.owner_uid:
        return rights_of(caller)
    root = reader.get(Credentials, manifest.root)
    if set(root.uids) != {manifest.owner_uid}:      # then the user's groups are unknown
        return FileRights(manifest.owner_uid, manifest.owner_gid, ())
    return FileRights(manifest.owner_uid, root.gids[_EFFECTIVE], tuple(root.groups))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""By whose rights the files of an image are opened: of another one than us, with its file-system ids and groups.

    an ordinary user restores his own       his
    root restores an image of root          root's: a service has its log opened before it gives up its rights
    root restores an image of a user        that user's

The last one because a path leads wherever its owner lets it: he may put a symbolic link in the place of a directory,
and by root's rights his own processes would come back with a file of root's.
"""

from contextlib import AbstractContextManager
from typing import NamedTuple

from ckptd.checks import Caller
from ckptd.image.reader import ImageReader
from ckptd.image.records import Credentials
from ckptd.kernel.creds import file_rights

_EFFECTIVE = 1      # of Credentials.gids


class Rights(NamedTuple):
    """A user as the file system sees one."""
    uid: int
    gid: int
    groups: tuple[int, ...]

    def taken(self, capabilities: int = 0) -> AbstractContextManager[None]:
        """Look up and make files as that user in this block, see ckptd.kernel.creds.file_rights."""
        return file_rights(self.uid, self.gid, self.groups, capabilities)


def rights_of(caller: Caller) -> Rights:
    return Rights(caller.uid, caller.gid, tuple(caller.groups))


def rights_for(reader: ImageReader, caller: Caller) -> Rights:
    """As the table above. ImageDamaged."""
    manifest = reader.manifest
    if caller.uid or not manifest.owner_uid:
        return rights_of(caller)
    root = reader.get(Credentials, manifest.root)
    if set(root.uids) != {manifest.owner_uid}:      # whose groups these are is not known then
        return Rights(manifest.owner_uid, manifest.owner_gid, ())
    return Rights(manifest.owner_uid, root.gids[_EFFECTIVE], tuple(root.groups))

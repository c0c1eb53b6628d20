# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that binds a unix socket to a path."""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from ckptd.journal.steps.base import Count, Lifetime, Moved, Path, Step, StepContext
from ckptd.journal.steps.rights import as_maker
from ckptd.kernel.unix import is_dead


class BindSocket(Step, frozen=True):
    """Bind a socket to a path with the rights of a user. The file of a dead socket there gets the name `aside` before.

    The undo removes the new file and puts the old one back. The new one has another inode than the old one, and its
    socket is dead, because the tree has ended before.
    """
    point = 'bind-socket'
    by_user = True
    lifetime = Lifetime.TREE
    path: Path
    aside: Path
    device: Count       # of the old file
    inode: Count        # likewise, 0 if there was none
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()

    def describe(self) -> str:
        return f'binding a socket to {self.path}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        as_maker(self, partial(put_back, self.path, self.aside, (self.device, self.inode)))


def put_back(path: str, aside: str, old: tuple[int, int]) -> None:
    """Give the old file its name again, with the rights of this process. Any file but a dead socket keeps the name."""
    with suppress(FileNotFoundError, ConnectionRefusedError):
        found = os.lstat(path)
        if stat.S_ISSOCK(found.st_mode) and (found.st_dev, found.st_ino) != old and is_dead(path):
            os.unlink(path)  # noqa: PTH108
    with suppress(FileNotFoundError):
        with suppress(FileExistsError):
            os.link(aside, path, follow_symlinks=False)
        os.unlink(aside)  # noqa: PTH108

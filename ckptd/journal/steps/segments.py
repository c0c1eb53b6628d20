# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that makes a System V segment."""

import errno
from collections.abc import Mapping
from typing import Annotated

import msgspec

from ckptd.journal.steps.base import Count, Lifetime, Moved, Step, StepContext
from ckptd.journal.steps.rights import as_maker
from ckptd.kernel.shm import shmctl_remove, shmctl_stat


class MakeSegment(Step, frozen=True):
    """Make a System V segment for a restored tree, with the rights of a user. It is undone by removing it, as long as
    it has this key and size and was made by this user."""
    point = 'make-segment'
    by_user = True
    lifetime = Lifetime.TREE
    shmid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    key: Count
    size: Count
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()

    def describe(self) -> str:
        return f'making System V segment {self.shmid}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        as_maker(self, self._remove)

    def _remove(self) -> None:
        try:
            found = shmctl_stat(self.shmid)
            if (found.key, found.size, found.cuid) == (self.key, self.size, self.uid):
                shmctl_remove(self.shmid)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EIDRM):      # it is gone already
                raise

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that makes System V semaphores or a message queue."""

import errno
from collections.abc import Mapping
from typing import Annotated

import msgspec

from ckptd.journal.steps.base import Count, Lifetime, Moved, Step, StepContext
from ckptd.journal.steps.rights import as_maker
from ckptd.kernel.msg import msgctl_remove, read_queue
from ckptd.kernel.sem import read_set, semctl_remove


class MakeSystemV(Step, frozen=True):
    """Make a set of System V semaphores, or a message queue, for a restored tree, with the rights of a user. It is
    undone by removing it, as long as it has this key and was made by this user."""
    point = 'make-system-v'
    by_user = True
    lifetime = Lifetime.TREE
    id: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    key: Count
    is_queue: bool
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()

    def describe(self) -> str:
        return f'making System V {"message queue" if self.is_queue else "set of semaphores"} {self.id}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        as_maker(self, self._remove)

    def _remove(self) -> None:
        read, remove = (read_queue, msgctl_remove) if self.is_queue else (read_set, semctl_remove)
        try:
            found, maker = read(self.id)
            if (found.key, maker) == (self.key, self.uid):
                remove(self.id)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EIDRM):      # it is gone already
                raise

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A set of System V semaphores (semget(2), semop(2)). A restart sets the values; times and the pids of semctl(2) are
new."""

from collections.abc import Iterator, Mapping

from ckptd.image.grammar import U16, Struct, layout
from ckptd.kernel.sem import SEMVMX, list_sets, read_set, semctl_set, semget_at
from ckptd.objects.ipc.base import IpcPermissions, SystemVKind
from ckptd.objects.support import Support


@layout
class SemaphoreState(Struct):
    """A set."""
    permissions: IpcPermissions
    values: tuple[U16, ...]


class SemaphoresKind(SystemVKind[SemaphoreState], tag='sem'):
    support = Support('System V semaphores that are named (--sysv)', refused='an id or key that is taken',
                      warned='adjustments at the end of a process (SEM_UNDO), the creator')
    words, remove = 'set of System V semaphores', '-s'

    def living(self) -> Mapping[int, int]:
        return {one.semid: one.key for one in list_sets()}

    def read(self, number: int) -> SemaphoreState:
        found, _ = read_set(number)
        return SemaphoreState(IpcPermissions(found.key, found.uid, found.gid, found.mode), found.values)

    def flaws(self, state: SemaphoreState) -> Iterator[str]:
        if not state.values or max(state.values) > SEMVMX:
            yield f'{len(state.values)} semaphores of up to {max(state.values, default=0)}'

    def make(self, number: int, state: SemaphoreState) -> None:
        semget_at(number, state.permissions.key, len(state.values))

    def fill(self, number: int, state: SemaphoreState) -> None:
        of = state.permissions
        semctl_set(number, state.values, of.uid, of.gid, of.mode)

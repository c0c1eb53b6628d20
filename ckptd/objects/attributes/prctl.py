# SPDX-License-Identifier: LGPL-2.1-or-later
"""Settings of prctl(2) that are a number: one class each, which differ only in the options that read and set them.

A value is kept only if it differs from the default.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from ckptd.errors import Finding
from ckptd.image.grammar import U64, Struct, layout
from ckptd.image.reader import ImageTask
from ckptd.kernel.prctl import (
    PR_GET_CHILD_SUBREAPER,
    PR_GET_IO_FLUSHER,
    PR_GET_MDWE,
    PR_GET_MEMORY_MERGE,
    PR_GET_THP_DISABLE,
    PR_GET_TSC,
    PR_MCE_KILL,
    PR_MCE_KILL_DEFAULT,
    PR_MCE_KILL_GET,
    PR_MCE_KILL_SET,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_IO_FLUSHER,
    PR_SET_MDWE,
    PR_SET_MEMORY_MERGE,
    PR_SET_THP_DISABLE,
    PR_SET_TSC,
    PR_TSC_ENABLE,
    prctl,
)
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    Reader,
    RestartRights,
    RestoredTask,
    Scope,
    about,
)
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch


@layout
class PrctlValue(Struct):
    value: U64


class Prctl(Attribute[PrctlValue, int]):
    """A setting.

    reads, sets: PR_*. by_pointer: the option stores the value at an address. since: the first Linux that has it, '' if
    every supported one does.
    """
    reads: ClassVar[int]
    sets: ClassVar[int]
    default: ClassVar[int]
    by_pointer: ClassVar[bool]
    since: ClassVar[str]

    def __init_subclass__(cls, *, reads: int, sets: int, default: int = 0, by_pointer: bool = False,
                          since: str = '', **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.reads, cls.sets, cls.default, cls.by_pointer, cls.since = reads, sets, default, by_pointer, since

    def ask(self, batch: Batch) -> Reader[int]:
        if self.by_pointer:
            out = batch.buffer(8)
            batch.call('prctl', self.reads, out, 0, 0, 0)
            return lambda results: int.from_bytes(results.data(out), 'little')
        call = batch.call('prctl', self.reads, 0, 0, 0, 0)
        return lambda results: results.or_else(call, self.default)

    def dump(self, of: DumpedTask, answer: int) -> PrctlValue | None:
        return PrctlValue(answer) if answer != self.default else None

    def obstacles(self, record: PrctlValue, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        if self.since and not self._is_there():
            yield about(task.vpid, 'kernel', 'ENOSYS', f'uses prctl {self.name}, which this kernel lacks',
                        f'boot a kernel {self.since} or newer')

    def _is_there(self) -> bool:
        try:
            prctl(self.reads)
        except OSError:
            return False
        return True

    def restore(self, record: PrctlValue, to: RestoredTask) -> None:
        to.script.call('prctl', self.sets, *self.arguments(record.value), about=self.name)

    def arguments(self, value: int) -> tuple[int, int, int, int]:
        """Return the arguments that set a value."""
        return value, 0, 0, 0


class ChildSubreaper(Prctl, name='PR_SET_CHILD_SUBREAPER', scope=Scope.PROCESS, reads=PR_GET_CHILD_SUBREAPER,
                     sets=PR_SET_CHILD_SUBREAPER, by_pointer=True):
    """Adopt orphans below the process as its children."""
    support = Support('reaper of orphans (PR_SET_CHILD_SUBREAPER)')


class ThpDisable(Prctl, name='PR_SET_THP_DISABLE', scope=Scope.MM, reads=PR_GET_THP_DISABLE, sets=PR_SET_THP_DISABLE):
    """Use no huge pages (bit 0). Since 6.18 there are flags beside it: bit 1 exempts memory for which madvise(2) asks
    for them."""
    support = Support('transparent huge pages off (PR_SET_THP_DISABLE)')

    def arguments(self, value: int) -> tuple[int, int, int, int]:
        return value & 1, value & ~1, 0, 0


class MemoryMerge(Prctl, name='PR_SET_MEMORY_MERGE', scope=Scope.MM, reads=PR_GET_MEMORY_MERGE,
                  sets=PR_SET_MEMORY_MERGE, since='6.4 with CONFIG_KSM'):
    """Merge equal pages (ksm)."""
    support = Support('merging of equal pages (PR_SET_MEMORY_MERGE)', refused='a kernel that lacks it')


class Mdwe(Prctl, name='PR_SET_MDWE', scope=Scope.MM, reads=PR_GET_MDWE, sets=PR_SET_MDWE, since='6.3'):
    """Deny making mappings executable later. This cannot be undone."""
    support = Support('no memory that is both writable and executable (PR_SET_MDWE)', refused='a kernel that lacks it')


class Tsc(Prctl, name='PR_SET_TSC', reads=PR_GET_TSC, sets=PR_SET_TSC, default=PR_TSC_ENABLE, by_pointer=True):
    """Permission of the thread to read the time-stamp counter."""
    support = Support('access to the time stamp counter (PR_SET_TSC)')


class MceKill(Prctl, name='PR_MCE_KILL', reads=PR_MCE_KILL_GET, sets=PR_MCE_KILL, default=PR_MCE_KILL_DEFAULT):
    """Time at which the thread learns of broken memory."""
    support = Support('policy for memory errors (PR_MCE_KILL)')

    def arguments(self, value: int) -> tuple[int, int, int, int]:
        return PR_MCE_KILL_SET, value, 0, 0


class IoFlusher(Prctl, name='PR_SET_IO_FLUSHER', reads=PR_GET_IO_FLUSHER, sets=PR_SET_IO_FLUSHER):
    """Mark the thread as part of a file system: its memory allocations do not wait for one."""
    support = Support('PR_SET_IO_FLUSHER', user='refused')

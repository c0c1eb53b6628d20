# SPDX-License-Identifier: LGPL-2.1-or-later
"""File descriptors that execve(2) keeps open, though fdinfo says O_CLOEXEC.

A slave that was opened by TIOCGPTPEER with O_CLOEXEC has that among the flags of the file (drivers/tty/pty.c,
ptm_open_peer), so that fdinfo shows it for each fd of the file (fs/proc/fd.c, seq_show). The process knows its fds.
"""

import fcntl
import os
from collections.abc import Generator, Sequence

from ckptd.image.grammar import U32, Struct, layout
from ckptd.kernel.fdinfo import list_fds, read_fdinfo
from ckptd.kernel.maps import Mapping
from ckptd.kernel.task import read_link
from ckptd.objects.attributes.base import Attribute, DumpedTask, RestoredTask, Scope
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results

_PER_BATCH = 100
_SLAVES = '/dev/pts/'


@layout
class KeptOpen(Struct):
    """File descriptors without FD_CLOEXEC that seem to have it."""
    fds: tuple[U32, ...]


class CloseOnExec(Attribute[KeptOpen, list[int]], name='close-on-exec', scope=Scope.PROCESS):
    support = Support('close-on-exec flags of terminals')

    def ask_more(self, tid: int, mappings: Sequence[Mapping]) -> Generator[Batch, Results, list[int]]:
        """Call fcntl(2) F_GETFD for each fd in question."""
        found: list[int] = []
        fds = [fd for fd in list_fds(tid) if _is_unclear(tid, fd)]
        for first in range(0, len(fds), _PER_BATCH):
            batch = Batch()
            calls = [(fd, batch.call('fcntl', fd, fcntl.F_GETFD, 0)) for fd in fds[first:first + _PER_BATCH]]
            results = yield batch
            found += [fd for fd, call in calls if not results.value(call) & fcntl.FD_CLOEXEC]
        return found

    def dump(self, of: DumpedTask, answer: list[int]) -> KeptOpen | None:
        return KeptOpen(tuple(answer)) if answer else None

    def restore(self, record: KeptOpen, to: RestoredTask) -> None:
        for fd in record.fds:
            to.script.call('fcntl', fd, fcntl.F_SETFD, 0, about=f'fd {fd}')


def _is_unclear(tid: int, fd: int) -> bool:
    return _SLAVES in read_link(tid, f'fd/{fd}') and bool(read_fdinfo(tid, fd).flags & os.O_CLOEXEC)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ask tasks by remote system calls for state that no other interface shows: one batch per thread, one more for its
process."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import PROT_READ

from ckptd.kernel.maps import Mapping, read_smaps
from ckptd.kernel.memory import PAGE
from ckptd.kernel.prctl import PR_GET_DUMPABLE
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import read_locked
from ckptd.objects.attributes.base import Scope
from ckptd.objects.attributes.registry import Answers, Questions, ask_more
from ckptd.remote.batch import Batch, Results
from ckptd.remote.borrow import OwnIds, Remote
from ckptd.remote.interleave import Steps, finish

PKEYS = range(1, 16)            # key 0 belongs to everyone (pkeys(7))
_NOWHERE = 0xFFFF800000000000   # an address of the kernel


@dataclass(frozen=True, slots=True)
class MemoryAnswers:
    """State of an address space. pkeys: a bit for each allocated protection key. lock_future: as in Mm."""
    brk: int
    dumpable: int
    pkeys: int
    lock_future: int


class _Memory:
    """The calls about an address space."""

    def __init__(self, batch: Batch) -> None:
        self._brk = batch.call('brk', 0)
        self._dumpable = batch.call('prctl', PR_GET_DUMPABLE)
        # Nothing can be mapped there, so this fails, but with another error for an allocated key (mm/mprotect.c).
        self._pkeys = {key: batch.call('pkey_mprotect', _NOWHERE, PAGE, PROT_READ, key) for key in PKEYS}

    def answers(self, results: Results, lock_future: int) -> MemoryAnswers:
        pkeys = sum(1 << key for key, call in self._pkeys.items() if results.values[call] == -errno.ENOMEM)
        return MemoryAnswers(results.value(self._brk), results.value(self._dumpable), pkeys, lock_future)


# the calls are the same for all tasks, so they are encoded once
_THREAD_BATCH, _FIRST_BATCH = Batch(), Batch()
_THREAD = Questions(_THREAD_BATCH, [Scope.THREAD])
_FIRST, _MEMORY = Questions(_FIRST_BATCH, Scope), _Memory(_FIRST_BATCH)


@dataclass(frozen=True, slots=True)
class RemoteState:
    """Answers of one process by tid; those of the first thread are for the process as well."""
    threads: dict[int, Answers]
    memory: MemoryAnswers


def ask(threads: Sequence[tuple[Tracee, OwnIds]], mappings: Sequence[Mapping], caught: int) -> Steps[RemoteState]:
    """Ask all stopped threads of one process; the first one answers for the process. Their state afterwards is
    unchanged. caught: signals with a handler, bit n-1 is signal n."""
    first, ids = threads[0]
    remote = Remote(first, ids, mappings, caught)
    answers: dict[int, Answers] = {}
    try:
        yield from remote.open()
        lock_future = _lock_future(first, remote.area)
        results = yield from remote.run(first, ids, _FIRST_BATCH)
        for tracee, own in threads[1:]:
            answers[tracee.tid] = Answers(_THREAD, (yield from remote.run(tracee, own, _THREAD_BATCH)), {})
        more = yield from ask_more(first.tid, mappings, lambda batch: remote.run(first, ids, batch))
    except BaseException:
        finish(remote.close())
        raise
    yield from remote.close()
    answers[first.tid] = Answers(_FIRST, results, more)
    return RemoteState(answers, _MEMORY.answers(results, lock_future))


def _lock_future(tracee: Tracee, area: int) -> int:
    """Return the effect of mlockall(2) on new mappings, such as that at `area`: 0 nothing, 1 MCL_FUTURE, 2 with
    MCL_ONFAULT."""
    if not read_locked(tracee.tid):
        return 0
    flags = next(mapping.vm_flags for mapping in read_smaps(tracee.tid) if mapping.start <= area < mapping.end)
    return 2 if 'lf' in flags else int('lo' in flags)

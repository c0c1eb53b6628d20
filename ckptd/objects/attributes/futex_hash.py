# SPDX-License-Identifier: LGPL-2.1-or-later
"""The private hash of futexes of an address space (PR_FUTEX_HASH(2const), since Linux 6.17)."""

import os

from ckptd.image.grammar import U32, Struct, layout
from ckptd.kernel.prctl import PR_FUTEX_HASH, PR_FUTEX_HASH_GET_SLOTS, PR_FUTEX_HASH_SET_SLOTS
from ckptd.objects.attributes.base import Attribute, DumpedTask, Reader, RestoredTask, Scope
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch

_LEAST, _PER_THREAD = 16, 4     # kernel/futex/core.c, futex_hash_allocate_default


@layout
class FutexHash(Struct):
    """The hash. slots: 0 for the hash that all processes share."""
    slots: U32


class FutexHashAttribute(Attribute[FutexHash, int | None], name='PR_FUTEX_HASH', scope=Scope.MM):
    support = Support('private hash of futexes')

    def ask(self, batch: Batch) -> Reader[int | None]:
        call = batch.call('prctl', PR_FUTEX_HASH, PR_FUTEX_HASH_GET_SLOTS, 0, 0, 0)
        return lambda results: results.values[call] if results.values[call] >= 0 else None

    def dump(self, of: DumpedTask, answer: int | None) -> FutexHash | None:
        return FutexHash(answer) if answer not in (None, _usual(of.status.threads)) else None

    def restore(self, record: FutexHash, to: RestoredTask) -> None:
        to.script.call('prctl', PR_FUTEX_HASH, PR_FUTEX_HASH_SET_SLOTS, record.slots, 0, 0, about='PR_FUTEX_HASH')


def _usual(threads: int) -> int:
    """Return the slots that the kernel has given a process when its last thread was made."""
    if threads < 2:
        return 0
    wanted = _PER_THREAD * min(threads - 1, os.cpu_count() or 1)
    return int(max(_LEAST, 1 << (wanted - 1).bit_length()))

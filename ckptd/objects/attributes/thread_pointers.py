# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses that the kernel keeps for a thread: the word that it clears at the thread's end, and the list of robust
futexes."""

from ckptd.image.records import ThreadPointers
from ckptd.kernel.futex import get_robust_list
from ckptd.kernel.prctl import PR_GET_TID_ADDRESS
from ckptd.kernel.ptrace import Tracee
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, Reader, RestoredTask
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch


class ClearedWord(Attribute[ThreadPointers, int], name='clear_child_tid'):
    """The word that the kernel clears when the thread ends (set_tid_address(2))."""
    support = Support('clear_child_tid of a thread')

    def ask(self, batch: Batch) -> Reader[int]:
        out = batch.buffer(8)
        batch.call('prctl', PR_GET_TID_ADDRESS, out)
        return lambda results: int.from_bytes(results.data(out), 'little')

    def dump(self, of: DumpedTask, answer: int) -> Fields:
        return {'clear_child_tid': answer}

    def restore(self, record: ThreadPointers, to: RestoredTask) -> None:
        to.script.call('set_tid_address', record.clear_child_tid)


class RobustList(Attribute[ThreadPointers, tuple[int, int]], name='robust list'):
    """The head of the list of robust futexes (set_robust_list(2))."""
    support = Support('robust futexes')

    def look(self, tracee: Tracee) -> tuple[int, int]:
        return get_robust_list(tracee.tid)

    def dump(self, of: DumpedTask, answer: tuple[int, int]) -> Fields:
        robust_list, length = answer
        return {'robust_list': robust_list, 'robust_list_len': length}

    def restore(self, record: ThreadPointers, to: RestoredTask) -> None:
        if record.robust_list_len:
            to.script.call('set_robust_list', record.robust_list, record.robust_list_len)

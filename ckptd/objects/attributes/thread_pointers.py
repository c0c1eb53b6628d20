# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses that the kernel keeps for a thread: the word that it clears at the thread's end, and the list of robust
futexes."""

from ckptd.image.records import ThreadPointers
from ckptd.kernel.futex import get_robust_list
from ckptd.kernel.prctl import PR_GET_TID_ADDRESS
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, Reader, RestoredTask
from ckptd.remote.batch import Batch


class ThreadAddresses(Attribute[ThreadPointers, int], name='thread pointers'):

    def ask(self, batch: Batch) -> Reader[int]:
        out = batch.buffer(8)
        batch.call('prctl', PR_GET_TID_ADDRESS, out)
        return lambda results: int.from_bytes(results.data(out), 'little')

    def dump(self, of: DumpedTask, answer: int) -> Fields:
        robust_list, length = get_robust_list(of.tid)
        return {'clear_child_tid': answer, 'robust_list': robust_list, 'robust_list_len': length}

    def restore(self, record: ThreadPointers, to: RestoredTask) -> None:
        to.script.call('set_tid_address', record.clear_child_tid)
        if record.robust_list_len:
            to.script.call('set_robust_list', record.robust_list, record.robust_list_len)

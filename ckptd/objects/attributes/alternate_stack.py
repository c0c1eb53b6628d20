# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stack for signal handlers of a thread (sigaltstack(2))."""

import ctypes
import struct

from ckptd.image.records import ThreadSignals
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, Reader, RestoredTask
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results

SS_ONSTACK, SS_DISABLE = 1, 2       # <asm-generic/signal-defs.h>
_STACK = struct.Struct('<QixxxxQ')  # stack_t


class AlternateStack(Attribute[ThreadSignals, tuple[int, int, int]], name='alternate stack'):
    support = Support('alternate signal stack')

    def ask(self, batch: Batch) -> Reader[tuple[int, int, int]]:
        out = batch.buffer(_STACK.size)
        batch.call('sigaltstack', 0, out)

        def read(results: Results) -> tuple[int, int, int]:
            sp, flags, size = _STACK.unpack(results.data(out))
            return sp, flags & 0xFFFFFFFF, size
        return read

    def dump(self, of: DumpedTask, answer: tuple[int, int, int]) -> Fields:
        return dict(zip(('altstack_sp', 'altstack_flags', 'altstack_size'), answer, strict=True))

    def restore(self, record: ThreadSignals, to: RestoredTask) -> None:
        flags = record.altstack_flags & ~SS_ONSTACK
        if flags != SS_DISABLE:     # a stub has no stack; a disabled one may have SS_AUTODISARM
            stack = _STACK.pack(record.altstack_sp, ctypes.c_int32(flags).value, record.altstack_size)
            to.script.call('sigaltstack', stack, 0, about='the stack for signal handlers')

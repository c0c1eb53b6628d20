# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interval timers of a process (setitimer(2)). Their signals lead to handlers, so they start after the shed."""

import struct

from ckptd.image.records import IntervalTimer, IntervalTimers
from ckptd.kernel.itimer import cpu_itimer_excess
from ckptd.objects.attributes.base import Attribute, DumpedTask, Fields, Reader, RestoredTask, Scope, Stage
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch

_ITIMER_REAL = 0
_COUNT = 3          # real, virtual, prof
_VALUE = struct.Struct('<4q')       # struct itimerval: interval, value


class IntervalTimersAttribute(Attribute[IntervalTimers, tuple[IntervalTimer, ...]],
                              name='interval timers', scope=Scope.PROCESS,
             stage=Stage.AFTER_RIGHTS):
    support = Support('interval timers (setitimer)')

    def ask(self, batch: Batch) -> Reader[tuple[IntervalTimer, ...]]:
        outs = [batch.buffer(_VALUE.size) for _ in range(_COUNT)]
        for which, out in enumerate(outs):
            batch.call('getitimer', which, out)
        return lambda results: tuple(_decode(results.data(out)) for out in outs)

    def dump(self, of: DumpedTask, answer: tuple[IntervalTimer, ...]) -> Fields:
        return {'timers': answer}

    def restore(self, record: IntervalTimers, to: RestoredTask) -> None:
        for which, timer in enumerate(record.timers):
            # An expired timer is started again when its SIGALRM is dequeued, and has no time left until then
            # (kernel/signal.c, dequeue_signal). Setting it to 0 would stop it.
            value = timer.value or timer.interval
            if value and which != _ITIMER_REAL:
                value = max(1, value - cpu_itimer_excess())
            to.script.call('setitimer', which, _VALUE.pack(*divmod(timer.interval, 10**6), *divmod(value, 10**6)), 0)


def _decode(data: bytes) -> IntervalTimer:
    interval, interval_us, value, value_us = _VALUE.unpack(data)
    return IntervalTimer(interval * 10**6 + interval_us, value * 10**6 + value_us)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""POSIX timers of a process (timer_create(2)), with their ids. Their signals lead to handlers, so they are made after
the shed."""

import ctypes
import struct
from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple

from ckptd.errors import CkptError, Finding
from ckptd.image.reader import ImageTask
from ckptd.image.records import PosixTimer, PosixTimers
from ckptd.kernel.creds import CAP_WAKE_ALARM
from ckptd.kernel.maps import Mapping
from ckptd.kernel.prctl import PR_TIMER_CREATE_RESTORE_IDS
from ckptd.kernel.task import SIGEV_THREAD_ID, ProcTimer, read_timers
from ckptd.kernel.timerfd import ALARM_CLOCKS
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    Fields,
    RestartRights,
    RestoredTask,
    Scope,
    Stage,
    about,
)
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch, Results
from ckptd.remote.interleave import Steps
from ckptd.remote.stub import Stub

_PER_BATCH = 100
_U32 = 2**32 - 1
_VALUE = struct.Struct('<4q')       # struct itimerspec: interval, value


class Left(NamedTuple):
    """The remaining time of a timer in nanoseconds, and the overruns counted at the last expiry."""
    interval_ns: int
    value_ns: int
    overrun: int


class PosixTimersAttribute(Attribute[PosixTimers, list[tuple[ProcTimer, Left]]],
                           name='POSIX timers', scope=Scope.PROCESS,
             stage=Stage.AFTER_RIGHTS):
    support = Support('POSIX timers, with their ids', user='alarm clocks are refused')

    def ask_more(self, tid: int, mappings: Sequence[Mapping]
                 ) -> Generator[Batch, Results, list[tuple[ProcTimer, Left]]]:
        """Call timer_gettime(2) and timer_getoverrun(2) for each timer."""
        found: list[tuple[ProcTimer, Left]] = []
        timers = read_timers(tid)
        for first in range(0, len(timers), _PER_BATCH):
            batch = Batch()
            rows = [(batch.buffer(_VALUE.size), timer) for timer in timers[first:first + _PER_BATCH]]
            calls = [(timer, batch.call('timer_gettime', timer.id, out), batch.call('timer_getoverrun', timer.id), out)
                     for out, timer in rows]
            results = yield batch
            for timer, gettime, getoverrun, out in calls:
                results.value(gettime)
                interval, interval_ns, value, value_ns = _VALUE.unpack(results.data(out))
                found.append((timer, Left(interval * 10**9 + interval_ns, value * 10**9 + value_ns,
                                          results.value(getoverrun))))
        return found

    def dump(self, of: DumpedTask, answer: list[tuple[ProcTimer, Left]]) -> Fields:
        return {'timers': tuple(
            PosixTimer(timer.id, timer.clock & _U32, timer.notify, timer.signal, timer.sigval,
                       of.process.vtids.get(timer.tid, 0), left.interval_ns, left.value_ns, left.overrun)
            for timer, left in answer)}

    def obstacles(self, record: PosixTimers, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        for timer in record.timers:
            if timer.clock in ALARM_CLOCKS and not rights.capable(CAP_WAKE_ALARM):
                yield about(record.vpid, f'timer {timer.id}', 'EPERM', f'its timer of {ALARM_CLOCKS[timer.clock]} '
                            'wakes a suspended machine, which needs CAP_WAKE_ALARM', 'restore it as root')

    def restore(self, record: PosixTimers, to: RestoredTask) -> Steps[None]:
        # /proc/PID/timers lists the newest first
        timers, stub = record.timers[::-1], to.stub
        if not timers:
            return
        by_id = yield from _restore_ids(stub, True)
        for timer in timers:
            if not by_id:
                yield from _skip_to(stub, timer)
            yield from _create(stub, timer, by_id=by_id)
        if by_id:
            yield from _restore_ids(stub, False)
        for timer in timers:
            value = _VALUE.pack(*divmod(timer.interval_ns, 10**9), *divmod(timer.value_ns, 10**9))
            to.script.call('timer_settime', timer.id, 0, value, 0, about=f'POSIX timer {timer.id}')


def _restore_ids(stub: Stub, on: bool) -> Steps[bool]:
    """Return whether timer_create(2) now takes the id from its third argument."""
    batch = Batch()
    batch.call('prctl', PR_TIMER_CREATE_RESTORE_IDS, int(on), 0, 0, 0)
    results = yield from stub.attempt(batch)
    return results.values[0] >= 0


def _create(stub: Stub, timer: PosixTimer, *, by_id: bool) -> Steps[int]:
    batch = Batch()
    event = struct.pack('<QiiI', timer.value, ctypes.c_int32(timer.signal).value, timer.notify,
                        timer.vtid if timer.notify & SIGEV_THREAD_ID else 0).ljust(64, b'\0')
    number = batch.buffer(8, struct.pack('<q', timer.id if by_id else 0))
    batch.call('timer_create', ctypes.c_int32(timer.clock).value, batch.buffer(64, event), number)
    try:
        results = yield from stub.run(batch)
    except OSError as error:
        raise CkptError(f'cannot make POSIX timer {timer.id}: {error.strerror}', errno=error.errno, task=stub.tid,
                        resource=f'timer {timer.id}') from error
    return int.from_bytes(results.data(number)[:4], 'little')


def _skip_to(stub: Stub, timer: PosixTimer) -> Steps[None]:
    """Use up the timer ids before the wanted one. Before Linux 6.15 the kernel assigns them in order."""
    while True:
        number = yield from _create(stub, timer, by_id=False)
        batch = Batch()
        batch.call('timer_delete', number)
        yield from stub.run(batch)
        if number >= timer.id - 1 or not timer.id:
            break

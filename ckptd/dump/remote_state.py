# SPDX-License-Identifier: LGPL-2.1-or-later
"""What only the task itself can say, asked by remote system calls: one batch for a thread, one more for its process."""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ckptd.image.records import IntervalTimer, SigAction
from ckptd.kernel.maps import Mapping, read_smaps
from ckptd.kernel.memory import PAGE
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import read_status
from ckptd.kernel.task import ProcTimer, read_timers
from ckptd.remote.batch import Batch, Out, Results
from ckptd.remote.borrow import OwnIds, Remote
from ckptd.remote.interleave import Steps, finish

SIGNALS = range(1, 65)
_NEVER_HANDLED = (9, 19)        # SIGKILL, SIGSTOP: rt_sigaction of them is EINVAL
_TIMERS_PER_BATCH = 100
_SIGSET_SIZE, _ACTION_SIZE = 8, 32

# <linux/prctl.h>
PR_GET_PDEATHSIG, PR_GET_DUMPABLE, PR_GET_KEEPCAPS, PR_GET_SECUREBITS, PR_GET_TIMERSLACK = 2, 3, 7, 27, 30
PR_GET_CHILD_SUBREAPER, PR_GET_TID_ADDRESS, PR_GET_THP_DISABLE = 37, 40, 42
PR_GET_TSC, PR_MCE_KILL_GET, PR_GET_SPECULATION_CTRL, PR_GET_IO_FLUSHER = 25, 34, 52, 58
PR_GET_MDWE, PR_GET_MEMORY_MERGE = 66, 68
PKEYS = range(1, 16)            # key 0 is everybody's, pkeys(7)
_NOWHERE = 0xFFFF800000000000   # addresses of the kernel
SPECULATIONS = range(3)         # PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_L1D_FLUSH
MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9       # <linux/membarrier.h>, since 6.3


@dataclass(frozen=True, slots=True)
class ThreadAnswers:
    """altstack: ss_sp, ss_flags, ss_size. clear_child_tid: an address. timer_slack: nanoseconds. speculation: PR_SPEC_*
    of each of SPECULATIONS. Of the last four, what the kernel does not have or does not tell is 0."""
    altstack: tuple[int, int, int]
    clear_child_tid: int
    pdeath_signal: int
    keepcaps: int
    securebits: int
    timer_slack: int
    tsc: int
    mce_kill: int
    io_flusher: int
    speculation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProcessAnswers:
    """actions: signals 1 to 64. itimers: real, virtual, prof. membarrier: MEMBARRIER_CMD_REGISTER_*. mdwe: PR_MDWE_*.
    Of the last four, what the kernel does not have is 0. pkeys: a bit for each protection key that is allocated."""
    actions: tuple[SigAction, ...]
    itimers: tuple[IntervalTimer, ...]
    brk: int
    dumpable: int
    child_subreaper: int
    thp_disabled: int
    membarrier: int
    mdwe: int
    memory_merge: int
    pkeys: int


class _Thread:
    """The calls about one thread."""

    def __init__(self, batch: Batch) -> None:
        self._altstack, self._address, self._pdeath = batch.buffer(24), batch.buffer(8), batch.buffer(8)
        batch.call('sigaltstack', 0, self._altstack)
        batch.call('prctl', PR_GET_TID_ADDRESS, self._address)
        batch.call('prctl', PR_GET_PDEATHSIG, self._pdeath)
        self._plain = [batch.call('prctl', option) for option in
                       (PR_GET_KEEPCAPS, PR_GET_SECUREBITS, PR_GET_TIMERSLACK)]
        self._tsc = batch.buffer(8)
        batch.call('prctl', PR_GET_TSC, self._tsc)
        self._newer = [batch.call('prctl', option, 0, 0, 0, 0) for option in (PR_MCE_KILL_GET, PR_GET_IO_FLUSHER)]
        self._speculation = [batch.call('prctl', PR_GET_SPECULATION_CTRL, which, 0, 0, 0) for which in SPECULATIONS]

    def answers(self, results: Results) -> ThreadAnswers:
        keepcaps, securebits, slack = (results.unsigned(call) for call in self._plain)
        mce_kill, io_flusher = (results.or_zero(call) for call in self._newer)
        sp, flags, size = struct.unpack('<QixxxxQ', results.data(self._altstack))
        return ThreadAnswers((sp, flags & 0xFFFFFFFF, size), _u64(results.data(self._address)),
                             _u64(results.data(self._pdeath)), keepcaps, securebits, slack,
                             _u64(results.data(self._tsc)), mce_kill, io_flusher,
                             tuple(results.or_zero(call) for call in self._speculation))


class _Process:
    """The calls about a process."""

    def __init__(self, batch: Batch) -> None:
        self._actions = batch.buffer(len(SIGNALS) * _ACTION_SIZE)
        for number in SIGNALS:
            if number not in _NEVER_HANDLED:
                at = self._actions.offset + (number - 1) * _ACTION_SIZE
                batch.call('rt_sigaction', number, 0, Out(at, _ACTION_SIZE), _SIGSET_SIZE)
        self._itimers = [batch.buffer(32) for _ in range(3)]
        for which, out in enumerate(self._itimers):
            batch.call('getitimer', which, out)
        self._brk = batch.call('brk', 0)
        self._dumpable = batch.call('prctl', PR_GET_DUMPABLE)
        self._thp = batch.call('prctl', PR_GET_THP_DISABLE, 0, 0, 0, 0)
        self._subreaper = batch.buffer(8)
        batch.call('prctl', PR_GET_CHILD_SUBREAPER, self._subreaper)
        self._newer = [batch.call('membarrier', MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0),
                       *(batch.call('prctl', option, 0, 0, 0, 0) for option in (PR_GET_MDWE, PR_GET_MEMORY_MERGE))]
        # where nothing can be mapped this fails, but in another way for a key that is allocated (mm/mprotect.c)
        self._pkeys = {key: batch.call('pkey_mprotect', _NOWHERE, PAGE, 1, key) for key in PKEYS}

    def answers(self, results: Results) -> ProcessAnswers:
        itimers = tuple(_itimer(results.data(out)) for out in self._itimers)
        membarrier, mdwe, memory_merge = (results.or_zero(call) for call in self._newer)
        pkeys = sum(1 << key for key, call in self._pkeys.items() if results.values[call] == -errno.ENOMEM)
        return ProcessAnswers(_actions(results.data(self._actions)), itimers, results.value(self._brk),
                              results.value(self._dumpable), _u64(results.data(self._subreaper)),
                              results.value(self._thp), membarrier, mdwe, memory_merge, pkeys)


# the same questions for everybody, encoded once
_THREAD_BATCH, _FIRST_BATCH = Batch(), Batch()
_THREAD = _Thread(_THREAD_BATCH)
_FIRST, _PROCESS = _Thread(_FIRST_BATCH), _Process(_FIRST_BATCH)


@dataclass(frozen=True, slots=True)
class TimerAnswer:
    """Nanoseconds; overruns counted by the last expiry."""
    interval_ns: int
    value_ns: int
    overrun: int


def _ask_timers(remote: Remote, tracee: Tracee, ids: OwnIds, timer_ids: Sequence[int]) -> Steps[list[TimerAnswer]]:
    """timer_gettime(2) and timer_getoverrun(2) of each, in batches."""
    found: list[TimerAnswer] = []
    for first in range(0, len(timer_ids), _TIMERS_PER_BATCH):
        batch = Batch()
        rows = [(batch.buffer(32), number) for number in timer_ids[first:first + _TIMERS_PER_BATCH]]
        calls = [(batch.call('timer_gettime', number, out), batch.call('timer_getoverrun', number), out)
                 for out, number in rows]
        results = yield from remote.run(tracee, ids, batch)
        for gettime, getoverrun, out in calls:
            results.value(gettime)
            interval, interval_ns, value, value_ns = struct.unpack('<4q', results.data(out))
            found.append(TimerAnswer(interval * 10**9 + interval_ns, value * 10**9 + value_ns,
                                     results.value(getoverrun)))
    return found


@dataclass(frozen=True, slots=True)
class RemoteState:
    """Of one process; threads by tid."""
    threads: dict[int, ThreadAnswers]
    process: ProcessAnswers
    timers: list[tuple[ProcTimer, TimerAnswer]]
    lock_future: int


def ask(threads: Sequence[tuple[Tracee, OwnIds]], mappings: Sequence[Mapping]) -> Steps[RemoteState]:
    """Ask all stopped threads of one process; the first one speaks for the process. They end as they were."""
    first, ids = threads[0]
    remote = Remote(first, ids, mappings)
    try:
        yield from remote.open()
        lock_future = _lock_future(first, remote.area)
        results = yield from remote.run(first, ids, _FIRST_BATCH)
        answers = {first.tid: _FIRST.answers(results)}
        for tracee, own in threads[1:]:
            answers[tracee.tid] = _THREAD.answers((yield from remote.run(tracee, own, _THREAD_BATCH)))
        timers = read_timers(first.tid)
        timer_answers = yield from _ask_timers(remote, first, ids, [timer.id for timer in timers])
    except BaseException:
        finish(remote.close())
        raise
    yield from remote.close()
    return RemoteState(answers, _PROCESS.answers(results), list(zip(timers, timer_answers, strict=True)),
                       lock_future)


def _lock_future(tracee: Tracee, area: int) -> int:
    """What mlockall(2) left for new mappings, such as that at `area`: 0 nothing, 1 MCL_FUTURE, 2 with MCL_ONFAULT."""
    if not read_status(tracee.tid).vm_lck:
        return 0
    flags = next(mapping.vm_flags for mapping in read_smaps(tracee.tid) if mapping.start <= area < mapping.end)
    return 2 if 'lf' in flags else int('lo' in flags)


@lru_cache(maxsize=64)      # forked children have their parent's table
def _actions(data: bytes) -> tuple[SigAction, ...]:
    return tuple(SigAction(*row) for row in struct.iter_unpack('<4Q', data))


def _itimer(data: bytes) -> IntervalTimer:
    interval, interval_us, value, value_us = struct.unpack('<4q', data)
    return IntervalTimer(interval * 10**6 + interval_us, value * 10**6 + value_us)


def _u64(data: bytes) -> int:
    return int.from_bytes(data, 'little')

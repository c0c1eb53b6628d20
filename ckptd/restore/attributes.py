# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything of a task that is neither memory nor open file, put back by calls of its own or by us from outside.

What needs a right comes before the shed (shed.py): thread, process, limits, schedule, terminal, fs. What memory of the
program steers, or what acts on it, comes after: rseq, actions, timers, queues, registers.
"""

import ctypes
import errno
import os
import resource
import struct
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache

from ckptd.errors import CkptError
from ckptd.image import records
from ckptd.image.reader import ImageReader
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.itimer import cpu_itimer_excess
from ckptd.kernel.prctl import prctl
from ckptd.kernel.sched import SchedAttr, ioprio_set, sched_setattr
from ckptd.kernel.task import SIGEV_THREAD_ID
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import finish
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub

# <linux/prctl.h>
PR_SET_NAME, PR_SET_TIMERSLACK, PR_SET_CHILD_SUBREAPER = 15, 29, 36
PR_SET_TSC, PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_DEFAULT, PR_SET_IO_FLUSHER = 26, 33, 1, 2, 57
PR_GET_SPECULATION_CTRL, PR_SET_SPECULATION_CTRL, PR_SPEC_PRCTL = 52, 53, 1
PR_TIMER_CREATE_RESTORE_IDS = 77        # since 6.15
SS_ONSTACK, SS_DISABLE = 1, 2           # <asm-generic/signal-defs.h>
SIGTRAP = 5
_NEVER_HANDLED = (9, 19)
_ITIMER_REAL = 0
_ALL = (1 << 64) - 1
_DEFAULT = records.SigAction(0, 0, 0, 0)


# ---------------------------------------------------------------- threads

def thread(reader: ImageReader, vpid: int, script: Script) -> None:
    """Restore the state of a thread: name, signal stack, addresses that the kernel keeps, timer slack."""
    task, signals = reader.get(records.TaskRecord, vpid), reader.get(records.ThreadSignals, vpid)
    pointers = reader.get(records.ThreadPointers, vpid)
    script.call('prctl', PR_SET_NAME, name_of(task))
    flags = signals.altstack_flags & ~SS_ONSTACK
    if not flags & SS_DISABLE and signals.altstack_size:
        stack = struct.pack('<QixxxxQ', signals.altstack_sp, ctypes.c_int32(flags).value, signals.altstack_size)
        script.call('sigaltstack', stack, 0, about='the stack for signal handlers')
    script.call('set_tid_address', pointers.clear_child_tid)
    if pointers.robust_list_len:
        script.call('set_robust_list', pointers.robust_list, pointers.robust_list_len)
    scheduling = reader.get(records.Scheduling, vpid)
    script.call('prctl', PR_SET_TIMERSLACK, scheduling.timer_slack)
    if controls := reader.table(records.ThreadControls).get(vpid):
        _controls(controls, script)


def rseq(reader: ImageReader, vpid: int, script: Script) -> None:
    """Register the restartable sequences of a thread. Memory of the program says where a sequence that is interrupted
    goes on, so this comes after the shed."""
    pointers = reader.get(records.ThreadPointers, vpid)
    if pointers.rseq:
        script.call('rseq', pointers.rseq, pointers.rseq_len, pointers.rseq_flags, pointers.rseq_signature,
                    about='rseq')


def _controls(controls: records.ThreadControls, script: Script) -> None:
    """Restore controls that differ from the default. Most tasks have none."""
    if controls.mce_kill != PR_MCE_KILL_DEFAULT:
        script.call('prctl', PR_MCE_KILL, PR_MCE_KILL_SET, controls.mce_kill, 0, 0)
    if controls.io_flusher:
        script.call('prctl', PR_SET_IO_FLUSHER, 1, 0, 0, 0, about='PR_SET_IO_FLUSHER')
    for which, (wanted, ours) in enumerate(zip(controls.speculation, speculation(), strict=False)):
        if wanted & PR_SPEC_PRCTL and wanted != ours:
            script.call('prctl', PR_SET_SPECULATION_CTRL, which, wanted & ~PR_SPEC_PRCTL, 0, 0, about='speculation')
    if controls.tsc > 1:
        script.call('prctl', PR_SET_TSC, controls.tsc, 0, 0, 0)


@cache
def speculation() -> tuple[int, ...]:
    """PR_GET_SPECULATION_CTRL of ourselves, which stubs inherit."""
    found = []
    for which in range(3):
        try:
            found.append(prctl(PR_GET_SPECULATION_CTRL, which, 0, 0, 0))
        except OSError:
            found.append(0)
    return tuple(found)


def name_of(task: records.TaskRecord) -> bytes:
    return task.comm.encode('utf-8', 'surrogateescape')[:15] + b'\0'


def schedule(record: records.Scheduling, tid: int) -> None:
    """Policy, priority, processors, done from outside while the stub has our rights."""
    allowed = {cpu for cpu in range(len(record.affinity) * 8) if record.affinity[cpu // 8] >> cpu % 8 & 1}
    here = os.sched_getaffinity(0)
    os.sched_setaffinity(tid, allowed & here or here)
    try:
        # of these policies alone sched_setattr(2) takes a nice value, but all keep one
        os.setpriority(os.PRIO_PROCESS, tid, record.nice - 20)
        sched_setattr(tid, SchedAttr(record.policy, record.flags, record.nice - 20, record.priority, record.runtime,
                                     record.deadline, record.period, record.util_min, record.util_max))
        ioprio_set(tid, record.ioprio)
    except OSError as error:
        raise CkptError(f'the scheduling of task {record.vpid} cannot be restored: {error}', errno=error.errno,
                        task=tid, resource='scheduling', hint='run ckptd with CAP_SYS_NICE') from error


# ---------------------------------------------------------------- processes

def limits(wanted_limits: Sequence[records.Limit], tid: int) -> None:
    """From outside, while the stub has our ids: then prlimit(2) needs no right but for raising hard limits."""
    for number, limit in enumerate(wanted_limits):
        wanted = (_limit(limit.soft), _limit(limit.hard))
        if resource.prlimit(tid, number) != wanted:
            resource.prlimit(tid, number, wanted)


def _limit(value: int) -> int:
    return resource.RLIM_INFINITY if value == _ALL else value


def coredump_filter(reader: ImageReader, mm_id: int, tid: int) -> None:
    """From outside; core(5)."""
    wanted = reader.get(records.Mm, mm_id).coredump_filter
    with open(f'/proc/{tid}/coredump_filter', 'rb+', buffering=0) as file:  # noqa: PTH123
        if int(file.read(16), 16) != wanted:
            file.write(f'{wanted:#x}'.encode())


def oom_score_adj(wanted: int, tid: int) -> None:
    with open(f'/proc/{tid}/oom_score_adj', 'rb+', buffering=0) as file:  # noqa: PTH123
        if int(file.read(16)) != wanted:
            file.write(str(wanted).encode())


def process(reader: ImageReader, vpid: int, script: Script) -> None:
    """Restore the state of a process besides its memory."""
    state = reader.get(records.ProcessState, vpid)
    script.call('personality', state.personality)
    if state.child_subreaper:
        script.call('prctl', PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def terminal(reader: ImageReader, vpid: int, vpgid: int, script: Script, fd: int) -> None:
    """The controlling terminal of a session whose leader this is, and who is in the foreground there."""
    state = reader.get(records.ProcessState, vpid)
    if state.tty:
        script.call('ioctl', fd, termios.TIOCSCTTY, 0, about='the controlling terminal')
        foreground = struct.pack('<i4x', state.tpgid or vpgid)
        script.call('ioctl', fd, termios.TIOCSPGRP, foreground, about='the foreground group of the terminal')


def interval_timers(reader: ImageReader, vpid: int, script: Script) -> None:
    """Start the interval timers of a process."""
    for which, timer in enumerate(reader.get(records.IntervalTimers, vpid).timers):
        # one that has rung is started anew when its SIGALRM is taken off the queue, and has no time left meanwhile
        # (kernel/signal.c, dequeue_signal); setting it to 0 would stop it
        value = timer.value or timer.interval
        if value and which != _ITIMER_REAL:
            value = max(1, value - cpu_itimer_excess())
        script.call('setitimer', which, struct.pack('<4q', *divmod(timer.interval, 10**6), *divmod(value, 10**6)), 0)


def posix_timers(reader: ImageReader, vpid: int, stub: Stub) -> None:
    """Make and start the POSIX timers of a process, with their old numbers."""
    # /proc/PID/timers has the newest first
    found = reader.get(records.PosixTimers, vpid).timers[::-1]
    if not found:
        return
    by_id = _restore_ids(stub, True)
    for timer in found:
        if not by_id:
            _skip_to(stub, timer)
        _create(stub, timer, by_id=by_id)
    if by_id:
        _restore_ids(stub, False)
    script = Script(stub)
    for timer in found:
        value = struct.pack('<4q', *divmod(timer.interval_ns, 10**9), *divmod(timer.value_ns, 10**9))
        script.call('timer_settime', timer.id, 0, value, 0, about=f'POSIX timer {timer.id}')
    script.do()


def _restore_ids(stub: Stub, on: bool) -> bool:
    """Whether timer_create(2) now takes the number from its third argument."""
    with suppress(OSError):
        Script(stub).call_now('prctl', PR_TIMER_CREATE_RESTORE_IDS, int(on), 0, 0, 0)
        return True
    return False


def _create(stub: Stub, timer: records.PosixTimer, *, by_id: bool) -> int:
    batch = Batch()
    event = struct.pack('<QiiI', timer.value, ctypes.c_int32(timer.signal).value, timer.notify,
                        timer.vtid if timer.notify & SIGEV_THREAD_ID else 0).ljust(64, b'\0')
    number = batch.buffer(8, struct.pack('<q', timer.id if by_id else 0))
    batch.call('timer_create', ctypes.c_int32(timer.clock).value, batch.buffer(64, event), number)
    try:
        results = stub.do(batch)
    except OSError as error:
        raise CkptError(f'POSIX timer {timer.id} cannot be made: {error.strerror}', errno=error.errno, task=stub.tid,
                        resource=f'timer {timer.id}') from error
    return int.from_bytes(results.data(number)[:4], 'little')


def _skip_to(stub: Stub, timer: records.PosixTimer) -> None:
    """Use up the timer numbers before the wanted one. Before Linux 6.15 the kernel gives them in turn."""
    while True:
        number = _create(stub, timer, by_id=False)
        Script(stub).call_now('timer_delete', number)
        if number >= timer.id - 1 or not timer.id:
            break


def fs(reader: ImageReader, fs_id: int, script: Script, directories: Callable[[str], int]) -> None:
    """Root, working directory and umask. directories: an fd of one by its path."""
    record = reader.get(records.Fs, fs_id)
    if record.root != '/':
        script.call('fchdir', directories(record.root), about=f'root directory {record.root}')
        script.call('chroot', b'.\0', about=f'root directory {record.root}')
    script.call('fchdir', directories(record.cwd), about=f'working directory {record.cwd}')
    script.call('umask', record.umask)


def actions(reader: ImageReader, sighand_id: int, script: Script) -> None:
    """All but that of SIGTRAP, which stubs need to have its default."""
    for number, action in _handled(reader.get(records.SignalActions, sighand_id).actions):
        script.call('rt_sigaction', number, action, 0, 8, about=f'signal {number}')


@lru_cache(maxsize=64)      # forked children have their parent's table
def _handled(actions: tuple[records.SigAction, ...]) -> list[tuple[int, bytes]]:
    """Signal actions that differ from those of a stub."""
    return [(number, action.encode()) for number, action in enumerate(actions, 1)
            if number not in (*_NEVER_HANDLED, SIGTRAP) and action != _DEFAULT]


def last_calls(reader: ImageReader, sighand_id: int) -> Batch:
    """Make the calls of a task that leaves its stub; none if SIGTRAP keeps its default action."""
    batch = Batch()
    action = reader.get(records.SignalActions, sighand_id).actions[SIGTRAP - 1]
    if action != _DEFAULT:
        batch.call('rt_sigaction', SIGTRAP, batch.buffer(32, action.encode()), 0, 8)
    return batch


# ---------------------------------------------------------------- signals and registers

def drain(stub: Stub) -> None:
    """Take off what making the tree has sent: SIGCHLD of ghosts and zombies."""
    tracee = stub.tracee
    while tracee.pending(shared=True) or tracee.pending(shared=False):
        batch = Batch()
        everything, nothing = batch.buffer(8, b'\xff' * 8), batch.buffer(16)
        rows = [batch.call('rt_sigtimedwait', everything, 0, nothing, 8) for _ in range(4)]
        results = finish(stub.attempt(batch))
        if any(results.values[row] == -errno.EAGAIN for row in rows):
            return


def queue(reader: ImageReader, vtgid: int, vpid: int, script: Script, *, shared: bool) -> None:
    """Signals that were pending, with all that they carry; the task sends them to itself."""
    if shared:
        for info in reader.get(records.ProcessState, vtgid).shared_pending:
            script.call('rt_sigqueueinfo', vtgid, info[0], info, about=f'pending signal {info[0]}')
        return
    for info in reader.get(records.ThreadSignals, vpid).pending:
        script.call('rt_tgsigqueueinfo', vtgid, vpid, info[0], info, about=f'pending signal {info[0]}')


def registers(reader: ImageReader, vpid: int, stub: Stub, instead: arch.user_regs_struct | None) -> None:
    """Set those of a task that has left its stub, or is about to run on from it, and its signal mask. instead: general
    registers to set instead of those of the image."""
    record = reader.get(records.Registers, vpid)
    tracee = stub.tracee
    tracee.set_xstate(record.xstate)
    tracee.regs = instead or arch.user_regs_struct.from_buffer_copy(record.gpr)
    tracee.sigmask = reader.get(records.ThreadSignals, vpid).mask

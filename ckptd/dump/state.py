# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of stopped tasks, as records: identity, credentials, scheduling, registers, signals, timers, limits."""

import os
import time
from collections.abc import Mapping as MappingABC

from ckptd.dump.remote_state import ProcessAnswers, ThreadAnswers, TimerAnswer
from ckptd.image import records
from ckptd.image.records import CHUNK
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.futex import get_robust_list
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.sched import ioprio_get, sched_getattr
from ckptd.kernel.stat import Stat
from ckptd.kernel.status import Status
from ckptd.kernel.task import (
    ProcTimer,
    read_limits,
    read_link,
    read_namespaces,
    read_oom_score_adj,
    read_personality,
)
from ckptd.tree import Task, Tree

_U32 = 2**32 - 1


def header(tree: Tree, processes: int) -> records.Header:
    return records.Header(
        tree.root.vtid, len(tree), processes, time.time_ns(), os.sysconf('SC_PAGE_SIZE'), os.uname().machine)


def _of_the_machine() -> list[tuple[str, int]]:
    """Namespaces of the first process: a service that dumps has a mount namespace of its own."""
    try:
        return list(read_namespaces(1).items())
    except (PermissionError, ProcessLookupError):
        return []


def namespaces(root: Task) -> records.Namespaces:
    own = {*read_namespaces(os.getpid()).items(), *_of_the_machine()}
    return records.Namespaces(tuple(records.Namespace(name, inode, int((name, inode) in own))
                                    for name, inode in sorted(read_namespaces(root.tid).items())))


def task_ids(tree: Tree) -> list[records.TaskIds]:
    """The ids of all tasks, 256 to a record."""
    chunks = [tree.tasks[first:first + CHUNK] for first in range(0, len(tree), CHUNK)]
    return [records.TaskIds(*(tuple(getattr(task, name) for task in chunk)
                              for name in ('vtid', 'vtgid', 'vppid', 'vpgid', 'vsid'))) for chunk in chunks]


def credentials(task: Task, status: Status, answers: ThreadAnswers) -> records.Credentials:
    return records.Credentials(
        task.vtid, status.uids, status.gids, status.groups,
        (status.cap_inh, status.cap_prm, status.cap_eff, status.cap_bnd, status.cap_amb),
        answers.securebits, int(status.no_new_privs), answers.keepcaps)


def zombie_credentials(task: Task, status: Status) -> records.Credentials:
    """What is left of a dead task: its parent gets the real uid with the exit code, waitid(2) si_uid."""
    return records.Credentials(
        task.vtid, status.uids, status.gids, status.groups,
        (status.cap_inh, status.cap_prm, status.cap_eff, status.cap_bnd, status.cap_amb), 0,
        int(status.no_new_privs), 0)


def scheduling(task: Task, answers: ThreadAnswers) -> records.Scheduling:
    attr = sched_getattr(task.tid)
    mask = sum(1 << cpu for cpu in os.sched_getaffinity(task.tid))
    return records.Scheduling(
        task.vtid, attr.policy, attr.flags, attr.nice + 20, attr.priority, attr.runtime, attr.deadline, attr.period,
        mask.to_bytes((mask.bit_length() + 63) // 64 * 8, 'little'), ioprio_get(task.tid), answers.timer_slack,
        attr.util_min, attr.util_max)


def registers(task: Task, tracee: Tracee) -> records.Registers:
    return records.Registers(task.vtid, arch.EM, bytes(tracee.regs), tracee.xstate())


def thread_signals(task: Task, tracee: Tracee, pending: tuple[bytes, ...],
                   answers: ThreadAnswers) -> records.ThreadSignals:
    return records.ThreadSignals(task.vtid, tracee.sigmask, *answers.altstack, pending)


def thread_pointers(task: Task, tracee: Tracee, answers: ThreadAnswers) -> records.ThreadPointers:
    rseq = tracee.rseq()
    return records.ThreadPointers(
        task.vtid, answers.clear_child_tid, *get_robust_list(task.tid), rseq.rseq_abi_pointer, rseq.rseq_abi_size,
        rseq.signature, rseq.flags, answers.pdeath_signal)


def thread_controls(task: Task, answers: ThreadAnswers) -> records.ThreadControls:
    return records.ThreadControls(task.vtid, answers.tsc, answers.mce_kill, answers.io_flusher, answers.speculation)


def process_state(leader: Task, stat: Stat, tracee: Tracee, pending: tuple[bytes, ...], answers: ProcessAnswers,
                  groups: MappingABC[int, int]) -> records.ProcessState:
    """groups: vpgid by pgid, for the foreground group of the terminal; one that the tree does not have is 0."""
    return records.ProcessState(
        leader.vtid, read_personality(tracee.tid), read_oom_score_adj(tracee.tid) + 1000, answers.child_subreaper,
        pending, stat.tty_nr & _U32, groups.get(stat.tpgid, 0))


def limits(leader: Task, anchor: int) -> records.Limits:
    """From /proc: prlimit(2) on a task of another uid needs CAP_SYS_RESOURCE."""
    return records.Limits(leader.vtid, tuple(records.Limit(soft, hard) for soft, hard in read_limits(anchor)))


def posix_timers(leader: Task, timers: list[tuple[ProcTimer, TimerAnswer]],
                 vtids: MappingABC[int, int]) -> records.PosixTimers:
    """vtids: vtid by tid, for SIGEV_THREAD_ID."""
    return records.PosixTimers(leader.vtid, tuple(
        records.PosixTimer(timer.id, timer.clock & _U32, timer.notify, timer.signal, timer.sigval,
                           vtids.get(timer.tid, 0), answer.interval_ns, answer.value_ns, answer.overrun)
        for timer, answer in timers))


def fs(fs_id: int, tid: int, umask: int) -> records.Fs:
    return records.Fs(fs_id, read_link(tid, 'cwd'), read_link(tid, 'root'), umask)

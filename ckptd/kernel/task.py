# SPDX-License-Identifier: LGPL-2.1-or-later
"""Smaller files of /proc/PID: threads, children, namespaces, limits, timers and single numbers."""

import os
import struct
from pathlib import Path
from typing import NamedTuple

from ckptd.kernel.procfs import gone_or, list_numbers, read_file, read_memory_file, read_task_file, task_dir, text

RLIM_INFINITY = (1 << 64) - 1
RLIM_NLIMITS = 16
# links below /proc/PID/ns (namespaces(7))
_NAMESPACES = ('cgroup', 'ipc', 'mnt', 'net', 'pid', 'pid_for_children', 'time', 'time_for_children', 'user', 'uts')

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4     # <asm-generic/siginfo.h>
_SIGEV_NAMES = {b'signal': SIGEV_SIGNAL, b'none': SIGEV_NONE, b'thread': SIGEV_THREAD}
_AUXV_ENTRY = struct.Struct('=QQ')


def pids() -> list[int]:
    """List every process of this /proc in ascending order."""
    return list_numbers('/proc', '')


def boot_id() -> str:
    """Return the random UUID of this boot (random(4))."""
    return text(read_file('/proc/sys/kernel/random/boot_id')).strip()


def read_threads(pid: int) -> list[int]:
    """Return the thread ids of a process: the leader first, then ascending."""
    tids = list_numbers(task_dir(pid), 'task')
    if tids and tids[0] != pid and pid in tids:     # ids wrap around, and exec gives any thread the leader's id
        tids.remove(pid)
        tids.insert(0, pid)
    return tids


def read_children(pid: int, tid: int) -> list[int]:
    """Return the children of one thread in the order of their birth. Complete only while none exits
    (proc_tid_children(5)).

    FileNotFoundError on a kernel without CONFIG_PROC_CHILDREN.
    """
    return [int(child) for child in read_task_file(task_dir(pid, tid), 'children').split()]


def read_cgroup2(pid: int) -> str:
    """Return the cgroup v2 path of a process as seen from the reader's cgroup namespace; '' without a v2 hierarchy."""
    return parse_cgroup2(read_task_file(task_dir(pid), 'cgroup'))


def parse_cgroup2(data: bytes) -> str:
    """Parse the path of the '0::' line of /proc/PID/cgroup. The path of a removed cgroup ends in ' (deleted)'."""
    for line in data.split(b'\n'):
        if line.startswith(b'0::'):
            return text(line[3:])
    return ''


def read_namespaces(pid: int, tid: int | None = None) -> dict[str, int]:
    """Return the inode of each namespace by the name of its link ('net', 'pid_for_children', ...). A zombie has only
    some of them.

    PermissionError without PTRACE_MODE_READ access.
    """
    directory = task_dir(pid, tid)
    found: dict[str, int] = {}
    try:
        names = os.listdir(f'{directory}/ns')  # noqa: PTH208
    except PermissionError:
        # The directory of a process that is not dumpable belongs to root. Its links can be read by those who may
        # inspect it, such as the process itself.
        names = list(_NAMESPACES)
    except FileNotFoundError as error:
        raise gone_or(error, directory) from None
    for name in names:
        try:
            link = os.readlink(f'{directory}/ns/{name}')  # noqa: PTH115
        except FileNotFoundError as error:
            missing = gone_or(error, directory)
            if missing is not error:
                raise missing from None
            continue
        found[name] = int(link[link.index('[') + 1:-1])     # 'net:[4026531840]'
    return found


def read_auxv(pid: int) -> bytes:
    """Read the auxiliary vector as the kernel keeps it; empty for a kernel thread or a zombie."""
    return read_memory_file(task_dir(pid), 'auxv')


def parse_auxv(data: bytes) -> dict[int, int]:
    """Parse the vector into AT_* -> value, without AT_NULL (getauxval(3))."""
    found: dict[int, int] = {}
    for key, value in _AUXV_ENTRY.iter_unpack(data):
        if key == 0:
            break
        found[key] = value
    return found


def bytes_written() -> int:
    """Return the bytes that this process has written so far to any file (proc_pid_io(5)); 0 where the kernel does not
    count."""
    try:
        fields = dict(line.split(b': ') for line in read_file('/proc/self/io').splitlines())
    except FileNotFoundError:
        return 0
    return int(fields[b'wchar'])


def read_limits(pid: int) -> tuple[tuple[int, int], ...]:
    """Read (soft, hard) by RLIMIT_* number. Unlike prlimit(2), this needs no CAP_SYS_RESOURCE for a task of another
    uid."""
    return parse_limits(read_limits_file(pid))


def read_limits_file(pid: int) -> bytes:
    """Read the text for parse_limits."""
    return read_task_file(task_dir(pid), 'limits')


def parse_limits(data: bytes) -> tuple[tuple[int, int], ...]:
    """Parse /proc/PID/limits. Its rows are in the order of the RLIMIT_* numbers, with names padded to 25 columns."""
    rows = [line[26:].split() for line in data.split(b'\n')[1:RLIM_NLIMITS + 1]]
    return tuple((_limit(soft), _limit(hard)) for soft, hard, *_ in rows)


def _limit(value: bytes) -> int:
    return RLIM_INFINITY if value == b'unlimited' else int(value)


class ProcTimer(NamedTuple):
    """A POSIX timer."""
    id: int
    signal: int
    sigval: int    # the pointer or int of sigev_value
    notify: int    # SIGEV_*, | SIGEV_THREAD_ID with a `tid`
    tid: int       # thread to signal, else 0
    clock: int     # clockid_t, negative for a CPU-time clock of a task


def read_timers(pid: int) -> tuple[ProcTimer, ...]:
    """Read the POSIX timers of a process. FileNotFoundError on a kernel without CONFIG_CHECKPOINT_RESTORE."""
    return parse_timers(read_task_file(task_dir(pid), 'timers'))


def parse_timers(data: bytes) -> tuple[ProcTimer, ...]:
    """Parse timers. Each has four lines, 'ID:', 'signal: 14/00007ffd...', 'notify: signal/tid.12' and 'ClockID:'."""
    values = [line.split(b': ', 1)[1] for line in data.split(b'\n') if b': ' in line]
    return tuple(_timer(*values[at:at + 4]) for at in range(0, len(values), 4))


def _timer(number: bytes, signal: bytes, notify: bytes, clock: bytes) -> ProcTimer:
    signo, sigval = signal.split(b'/')
    how, whom = notify.split(b'/')
    kind, target = whom.split(b'.')
    tid = int(target) if kind == b'tid' else 0
    return ProcTimer(int(number), int(signo), int(sigval, 16), _SIGEV_NAMES[how] | (SIGEV_THREAD_ID if tid else 0), tid,
                     int(clock))


def read_link(pid: int, name: str) -> str:
    """Return the target of /proc/PID/NAME ('cwd', 'root', 'exe', 'fd/3'). FileNotFoundError if the task has none (a
    zombie)."""
    directory = task_dir(pid)
    try:
        return os.readlink(f'{directory}/{name}')  # noqa: PTH115
    except FileNotFoundError as error:
        raise gone_or(error, directory) from None


def read_personality(pid: int, tid: int | None = None) -> int:
    """Read the personality(2) of a task. Needs PTRACE_MODE_ATTACH access."""
    return int(read_task_file(task_dir(pid, tid), 'personality'), 16)


def read_oom_score_adj(pid: int) -> int:
    """Read a value from -1000 to 1000 (proc_pid_oom_score_adj(5))."""
    return int(read_task_file(task_dir(pid), 'oom_score_adj'))


def read_loginuid(pid: int) -> int:
    """Read the uid of the login that a process descends from, for the audit log; -1 if none was set, or the kernel has
    no CONFIG_AUDIT."""
    try:
        value = int(read_task_file(task_dir(pid), 'loginuid'))
    except FileNotFoundError:
        return -1
    return -1 if value == (1 << 32) - 1 else value


def read_coredump_filter(pid: int) -> int:
    """Read the bit mask of the kinds of memory in a core dump (core(5))."""
    return int(read_memory_file(task_dir(pid), 'coredump_filter') or b'0', 16)


def read_timerslack(tid: int) -> int:
    """Read the timer slack of a thread in nanoseconds. For another process's thread this needs CAP_SYS_NICE."""
    # the file is not in /proc/PID/task/TID, but /proc/TID works for any thread
    return int(read_task_file(task_dir(tid), 'timerslack_ns'))


def task_exists(pid: int, tid: int | None = None) -> bool:
    """Whether the task exists, if only as a zombie."""
    return Path(task_dir(pid, tid)).exists()

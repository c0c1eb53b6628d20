# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/stat: the state of a task in one line (proc_pid_stat(5)). A scan reads it twice per task, so parsing is
fast."""

from typing import NamedTuple

from ckptd.kernel.procfs import read_task_file, task_dir, text

# <linux/sched.h>, of Stat.flags
PF_EXITING = 0x00000004
PF_IO_WORKER = 0x00000010        # runs requests of an io_uring, as a thread of the process that submitted them
PF_FORKNOEXEC = 0x00000040
PF_SUPERPRIV = 0x00000100
PF_SIGNALED = 0x00000400
PF_USER_WORKER = 0x00004000      # kernel code that runs as a thread of a process, for io_uring or vhost
PF_KTHREAD = 0x00200000


class Stat(NamedTuple):
    """A named tuple rather than a dataclass, since ten thousand are made while a tree is frozen and it costs a fifth.

    Addresses, exit_code and the fields after env_start are 0 for a reader without PTRACE_MODE_READ access to the task.
    """
    pid: int
    comm: str
    state: str    # one letter
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    flags: int         # PF_*
    num_threads: int
    start_time: int    # clock ticks since boot
    nice: int
    start_code: int
    end_code: int
    start_stack: int
    exit_signal: int
    rt_priority: int
    policy: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int    # wait(2) status of a zombie


def parse_stat(data: bytes) -> Stat:
    """Parse one line. ValueError if it is malformed."""
    # comm stands unescaped in parentheses and may contain any of ') (\n', so its end is the last ')'
    start, end = data.index(b'('), data.rindex(b')')
    field = data[end + 2:].split()      # field[0] is number 3 of the man page
    return Stat(
        int(data[:start]), text(data[start + 1:end]), chr(field[0][0]),
        int(field[1]), int(field[2]), int(field[3]), int(field[4]), int(field[5]), int(field[6]),
        int(field[17]), int(field[19]), int(field[16]), int(field[23]), int(field[24]), int(field[25]),
        int(field[35]), int(field[37]), int(field[38]), int(field[42]), int(field[43]), int(field[44]),
        int(field[45]), int(field[46]), int(field[47]), int(field[48]), int(field[49]))


def read_stat(pid: int, tid: int | None = None) -> Stat:
    """Read the stat line of a process, or of its thread `tid`. ProcessLookupError when it is gone."""
    return parse_stat(read_task_file(task_dir(pid, tid), 'stat'))

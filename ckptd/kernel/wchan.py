# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/PID/wchan: the kernel function that a task sleeps in (proc_pid_wchan(5))."""

from ckptd.kernel.procfs import read_task_file, task_dir, text


def read_wchan(pid: int, tid: int | None = None) -> str:
    """Return, for example, 'do_wait'; '' for a task that runs, without PTRACE_MODE_READ access, or without
    CONFIG_KALLSYMS."""
    try:
        name = text(read_task_file(task_dir(pid, tid), 'wchan'))
    except (FileNotFoundError, PermissionError):
        return ''
    return '' if name == '0' else name

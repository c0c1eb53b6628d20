# SPDX-License-Identifier: LGPL-2.1-or-later
"""Yama, the security module that restricts ptrace(2); see the kernel's admin-guide/LSM/Yama.rst."""

from typing import Final, NamedTuple

from ckptd.kernel.prctl import PR_SET_PTRACER, prctl
from ckptd.kernel.procfs import read_file

PTRACE_SCOPE: Final = '/proc/sys/kernel/yama/ptrace_scope'

# values of ptrace_scope
ANYBODY: Final = 0      # who has the same uid, as without Yama
DECLARED: Final = 1     # an ancestor, or whom the task has declared by PR_SET_PTRACER
CAPABLE: Final = 2      # who has CAP_SYS_PTRACE; that is enough for 1 as well
NOBODY: Final = 3       # until the next boot


def ptrace_scope() -> int:
    """Read the current value; ANYBODY on a kernel without Yama."""
    try:
        return int(read_file(PTRACE_SCOPE))
    except FileNotFoundError:
        return ANYBODY


def set_ptracer(pid: int) -> bool:
    """Let a process and its descendants trace the calling process; 0: none. False on a kernel without Yama, or if there
    is no such process. A tracer that was declared before is replaced.
    """
    try:
        prctl(PR_SET_PTRACER, pid)
    except OSError:
        return False
    return True


class Forbidden(NamedTuple):
    """The reason why a task may be inspected and not traced."""
    reason: str
    hint: str


def untraceable() -> Forbidden:
    """Name the rule by which a security module forbids tracing, as far as it is known."""
    scope = ptrace_scope()
    reason = f'Yama forbids it (kernel.yama.ptrace_scope={scope})'
    if scope == NOBODY:
        return Forbidden(reason, 'no process may be traced until the next boot, by root neither: see what sets '
                         'kernel.yama.ptrace_scope, in /etc/sysctl.d')
    if scope in (DECLARED, CAPABLE):
        return Forbidden(reason, 'run as root, or have polkit allow it to a checkpoint (org.ckptd1.trace-under-yama)'
                         + (', or let the program ask itself (CheckpointSelf)' if scope == DECLARED else ''))
    return Forbidden('a security module forbids it', 'its messages, as in journalctl -k, name the rule')

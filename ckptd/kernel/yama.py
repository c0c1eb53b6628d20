# SPDX-License-Identifier: LGPL-2.1-or-later
"""Yama, the security module that restricts ptrace(2) (the kernel's admin-guide/LSM/Yama.rst)."""

from typing import Final, NamedTuple

from ckptd.kernel.prctl import PR_SET_PTRACER, prctl
from ckptd.kernel.procfs import read_file

PTRACE_SCOPE: Final = '/proc/sys/kernel/yama/ptrace_scope'

# values of ptrace_scope
ANYBODY: Final = 0      # processes with the same uid, as without Yama
DECLARED: Final = 1     # ancestors, and tracers that the task has declared by PR_SET_PTRACER
CAPABLE: Final = 2      # processes with CAP_SYS_PTRACE, which is sufficient for 1 as well
NOBODY: Final = 3       # until the next boot


def ptrace_scope() -> int:
    """Read the current value; ANYBODY on a kernel without Yama."""
    try:
        return int(read_file(PTRACE_SCOPE))
    except FileNotFoundError:
        return ANYBODY


def set_ptracer(pid: int) -> bool:
    """Let a process and its descendants trace the calling process; 0: none. Return False on a kernel without Yama, or
    if there is no such process. It replaces an earlier declaration."""
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
        return Forbidden(reason, 'no process may be traced until the next boot, not even by root: find the setting of '
                         'kernel.yama.ptrace_scope, in /etc/sysctl.d')
    if scope in (DECLARED, CAPABLE):
        return Forbidden(reason, 'run as root, or let polkit allow it (org.ckptd1.trace-under-yama)'
                         + (', or let the program call CheckpointSelf' if scope == DECLARED else ''))
    return Forbidden('a security module forbids it', 'see its messages (journalctl -k) for the rule')

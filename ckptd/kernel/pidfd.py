# SPDX-License-Identifier: LGPL-2.1-or-later
"""pidfds: references to a process or thread that no other one can inherit, pidfd_open(2)."""

import os
import select
import signal

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_uint, syscall
from ckptd.kernel.fdinfo import parse_fdinfo
from ckptd.kernel.procfs import read_task_file

PIDFD_THREAD = os.O_EXCL            # <linux/pidfd.h>, since 6.9: refer to one thread, not to the process
PIDFD_NONBLOCK = os.O_NONBLOCK


def pidfd_open(pid: int, flags: int = 0) -> int:
    """A new pidfd, close-on-exec. EINVAL or ENOENT for the id of a thread without PIDFD_THREAD."""
    return os.pidfd_open(pid, flags)


@syscall(NR['pidfd_getfd'])
def pidfd_getfd(pidfd: c_int, targetfd: c_int, flags: c_uint = 0) -> c_int:
    """A duplicate of the target's fd, close-on-exec; needs PTRACE_MODE_ATTACH access. pidfd_getfd(2), since 5.6."""


def pidfd_send_signal(pidfd: int, sig: int) -> None:
    """Send a signal to exactly the task of the pidfd. ProcessLookupError when it is dead and reaped."""
    signal.pidfd_send_signal(pidfd, sig)


def pidfd_pid(fd: int) -> int:
    """The id of the task in the caller's pid namespace: 0 if it has none there, -1 once it is dead and reaped.

    KeyError if `fd` is no pidfd.
    """
    return int(parse_fdinfo(read_task_file('/proc/self', f'fdinfo/{fd}')).fields['Pid'][0])


def wait_dead(fd: int, timeout: float | None = None) -> bool:
    """Wait until the task has exited (it may still be a zombie); False when `timeout` seconds have passed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))

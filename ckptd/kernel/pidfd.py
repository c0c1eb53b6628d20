# SPDX-License-Identifier: LGPL-2.1-or-later
"""pidfds: references to a process or thread that no other one can inherit, pidfd_open(2)."""

import errno
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_uint, syscall
from ckptd.kernel.fdinfo import parse_fdinfo
from ckptd.kernel.procfs import read_task_file
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status

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


def pidfd_start_time(fd: int, pid: int) -> int:
    """When the process of a pidfd began, as Stat.start_time; -1 once it has exited, which is no process's. pid: its."""
    try:
        start_time = read_stat(pid).start_time
    except ProcessLookupError:
        return -1
    # alive after the file was read: the number was not another's in between
    return -1 if wait_dead(fd, 0) else start_time


def open_process(pid: int, start_time: int) -> int:
    """A new pidfd of the process that began at start_time, as of Stat; 0: of whichever has the number.
    ProcessLookupError once it has exited."""
    fd = _open_process(pid)
    if start_time and pidfd_start_time(fd, pid) != start_time:
        os.close(fd)
        raise _gone(pid)
    return fd


@contextmanager
def held(pid: int, start_time: int = 0, uid: int = -1) -> Iterator[None]:
    """Guarantee that what the block reads below /proc/PID belongs to the process that began at start_time; with 0, to
    one process, whichever has the pid.

    ProcessLookupError when it has exited at either end of the block: discard what was read. The same if the process is
    not this user's alone: a set-user-ID program has the pid and start time of the user's process, but other limits
    (sudo lifts its own).
    """
    fd = open_process(pid, start_time)
    try:
        yield
        if (uid >= 0 and set(read_status(pid).uids[:3]) != {uid}) or wait_dead(fd, 0):
            raise _gone(pid)
    finally:
        os.close(fd)


def _open_process(pid: int) -> int:
    try:
        return pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):     # 0, or the number is a thread's now
            raise _gone(pid) from None
        raise


def _gone(pid: int) -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f'/proc/{pid}')

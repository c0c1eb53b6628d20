# SPDX-License-Identifier: LGPL-2.1-or-later
"""pidfds: references to a process or thread that never refer to another one (pidfd_open(2))."""

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
    """Open a pidfd, close-on-exec. EINVAL or ENOENT for the id of a thread without PIDFD_THREAD."""
    return os.pidfd_open(pid, flags)


@syscall(NR['pidfd_getfd'])
def pidfd_getfd(pidfd: c_int, targetfd: c_int, flags: c_uint = 0) -> c_int:
    """Return a duplicate of the target's fd, close-on-exec. Needs PTRACE_MODE_ATTACH access. pidfd_getfd(2), since
    5.6."""


def pidfd_send_signal(pidfd: int, sig: int) -> None:
    """Send a signal to exactly the task of the pidfd. ProcessLookupError when it is dead and reaped."""
    signal.pidfd_send_signal(pidfd, sig)


def pidfd_pid(fd: int) -> int:
    """Return the id of the task in the caller's pid namespace: 0 if it has none there, -1 once it is dead and reaped.

    KeyError if `fd` is not a pidfd.
    """
    return int(parse_fdinfo(read_task_file('/proc/self', f'fdinfo/{fd}')).fields['Pid'][0])


def wait_dead(fd: int, timeout: float | None = None) -> bool:
    """Wait until the task has exited (it may still be a zombie). Return False when `timeout` seconds have passed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else max(0.0, timeout) * 1000))


def pidfd_start_time(fd: int, pid: int) -> int:
    """Return the start time of a pidfd's process, as in Stat.start_time; -1 once it has exited. pid: that of the
    process."""
    try:
        start_time = read_stat(pid).start_time
    except ProcessLookupError:
        return -1
    # the process is alive after the file was read, so the pid was not another process's in between
    return -1 if wait_dead(fd, 0) else start_time


def open_process(pid: int, start_time: int) -> int:
    """Open a pidfd of the process that began at start_time, as in Stat; 0: of any process with this pid.
    ProcessLookupError once it has exited."""
    fd = _open_process(pid)
    if start_time and pidfd_start_time(fd, pid) != start_time:
        os.close(fd)
        raise _gone(pid)
    return fd


@contextmanager
def held(pid: int, start_time: int = 0, uid: int = -1) -> Iterator[None]:
    """Guarantee that everything the block reads below /proc/PID belongs to the process that began at start_time; with
    0, to any one process with this pid.

    ProcessLookupError if it has exited at either end of the block: discard what was read. The same error is raised if
    the process does not belong to this user only: a set-user-ID program has the pid and start time of the user's
    process, but other limits (sudo raises its own).
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
        if error.errno in (errno.EINVAL, errno.ENOENT):     # 0, or the pid is now that of a thread
            raise _gone(pid) from None
        raise


def _gone(pid: int) -> ProcessLookupError:
    return ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f'/proc/{pid}')

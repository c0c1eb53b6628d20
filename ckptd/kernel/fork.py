# SPDX-License-Identifier: LGPL-2.1-or-later
"""fork(2) for a child that only makes system calls and calls _exit()."""

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


def quiet_fork() -> int:
    """Call fork(2) without the warning of Python 3.12 that another thread may hold a lock.

    The child must not take a lock: it waits for ever for a lock that another thread holds during the fork.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        return os.fork()


@contextmanager
def waiting_child(end: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Fork a child, which exists in the block. Then it calls `end`, exits with status 0 unless that has ended it, and
    is reaped."""
    reader, writer = os.pipe()
    child = quiet_fork()
    if child == 0:
        try:
            os.close(writer)
            os.read(reader, 1)
            end()
        finally:
            os._exit(0)
    os.close(reader)
    try:
        yield child
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def run_in_child(work: Callable[[], object]) -> None:
    """Do the work in a child, which alone it changes, and wait for its end. An OSError of the child is raised here."""
    pid = quiet_fork()
    if pid == 0:
        run_and_exit(work)
    _, status = os.waitpid(pid, 0)
    number = os.WEXITSTATUS(status) if os.WIFEXITED(status) else errno.EINTR
    if number:
        raise OSError(number, os.strerror(number))


def run_and_exit(work: Callable[[], object]) -> NoReturn:
    """Do the work in a child and end with status 0, the errno of an OSError, or EIO for any other exception."""
    status = errno.EIO
    try:
        work()
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    finally:
        os._exit(status)

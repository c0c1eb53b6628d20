# SPDX-License-Identifier: LGPL-2.1-or-later
"""A table of fds of one thread (CLONE_FILES of unshare(2)), in which any number can be used."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckptd.kernel.clone import CLONE_FILES
from ckptd.kernel.timens import unshare


def with_own_files(work: Callable[[], None]) -> None:
    """Do the work in a thread that has a copy of our fds, and in whose table it may change every number. The copies are
    closed when this returns, and no number of ours has changed. An exception of the work is raised here."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            unshare(CLONE_FILES)
            work()
        except BaseException as error:  # noqa: BLE001 - it is raised again by the thread that waits
            failed.append(error)

    thread = threading.Thread(target=run, name='own-files')
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@contextmanager
def at_number(fd: int, number: int) -> Iterator[None]:
    """Have a file at this number of an own table, in place of the file that is there. OSError EBADF for a number
    above the limit of open files."""
    if fd == number:
        yield
        return
    try:
        kept = os.dup(number)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        kept = -1
    os.dup2(fd, number)
    try:
        yield
    finally:
        if kept >= 0:
            os.dup2(kept, number)
            os.close(kept)
        else:
            os.close(number)

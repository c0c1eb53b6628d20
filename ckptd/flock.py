# SPDX-License-Identifier: LGPL-2.1-or-later
"""Use flock(2) as a sign of life: a process that holds the lock of a file is alive, and others leave the file alone.

The lock belongs to the open file description, so a forked child holds it as well. If the child kept it, its parent
would count as alive after its death. There is no close-on-fork flag, so each child closes its parent's locks before it
does anything else.
"""

import contextlib
import fcntl
import os

_held: set[int] = set()


def lock(fd: int, *, wait: bool = True) -> None:
    """Lock the file for as long as `fd` is open. With wait=False, BlockingIOError if another process holds the lock."""
    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    _held.add(fd)


def close(fd: int) -> None:
    """Close an fd that has, or may have, a lock."""
    _held.discard(fd)
    os.close(fd)


def is_locked(path: str | os.PathLike[str]) -> bool:
    """Whether a process holds the lock of a file or directory. False if the file is gone."""
    return not _try(path, fcntl.LOCK_NB)


def wait_free(path: str | os.PathLike[str]) -> None:
    """Wait until no process holds the lock, or the file is gone."""
    _try(path, 0)


def _try(path: str | os.PathLike[str], flags: int) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | flags)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _forget_all() -> None:
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_all)

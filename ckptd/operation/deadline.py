# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the waits for the tracees of a job end. A stop takes microseconds; one that does not come, because the cgroup
was frozen meanwhile or a device does not answer, must not keep a tree stopped."""

import errno
import time
from collections.abc import Callable

from ckptd.errors import CkptError, FreezeTimeout
from ckptd.kernel.stat import read_stat
from ckptd.kernel.wchan import read_wchan

GRACE = 1.0         # seconds in which a task may end the remote call that it has begun, before Cancel is listened to
CLEANUP = 1.0       # seconds that all waits of the cleaning up have together
LONG = 300.0        # seconds for a batch of a stub, which reads up to 32 MiB from the spool or locks a mapping in
                    # memory, and for the end of a task that was killed, which gives back its memory


class Patience:
    """Asked by Tracee.wait at times. seconds: how long one wait may last; then it ends with an error of class `kind`.
    check: raises Cancelled where the job was cancelled; called in waits that have lasted `grace` seconds.

    The cleaning up after that waits for tasks as well, perhaps for the same one: all of it has CLEANUP seconds, and
    Cancel is not listened to.
    """

    def __init__(self, seconds: float, check: Callable[[], None], *, kind: type[CkptError] = FreezeTimeout,
                 grace: float = GRACE) -> None:
        self._seconds, self._check, self._kind, self._grace = seconds, check, kind, grace
        self._end: float | None = None

    def __call__(self, tid: int, waited: float) -> None:
        if self._end is not None:
            if time.monotonic() >= self._end:
                raise self._timeout(tid, waited)
            return
        try:
            if waited >= self._grace:
                self._check()
            if waited >= self._seconds:
                raise self._timeout(tid, waited)
        except CkptError:
            self._end = time.monotonic() + CLEANUP
            raise

    def _timeout(self, tid: int, waited: float) -> CkptError:
        return self._kind(f'task {tid} has not stopped for its tracer within {waited:.0f} s{_whereabouts(tid)}',
                          errno=errno.ETIMEDOUT, task=tid, resource='ptrace',
                          hint='is its cgroup frozen, or does a device or file system not answer?')


def stub_patience(check: Callable[[], None]) -> Patience:
    """For stubs. They can be killed in the middle of anything, so a Cancel is listened to at once."""
    return Patience(LONG, check, kind=CkptError, grace=0)


def dying_patience() -> Patience:
    """For tasks that were sent SIGKILL."""
    return Patience(LONG, _nothing, kind=CkptError)


def _nothing() -> None:
    """Nobody is listened to."""


def _whereabouts(tid: int) -> str:
    try:
        return f': state {read_stat(tid).state}, sleeps in {read_wchan(tid) or "nothing"}'
    except OSError:
        return ''

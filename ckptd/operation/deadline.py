# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits for the waits for tracees. A stop takes microseconds. If one does not come, because the cgroup was frozen
meanwhile or a device does not answer, it must not keep a tree stopped."""

import errno
import time
from collections.abc import Callable

from ckptd.errors import CkptError, FreezeTimeout
from ckptd.kernel.stat import read_stat
from ckptd.kernel.wchan import read_wchan

GRACE = 1.0         # seconds for a task to end the remote call that it has begun, before Cancel takes effect
CLEANUP = 1.0       # seconds for all waits of the cleanup together
LONG = 300.0        # seconds for a batch of a stub, which reads up to 32 MiB from the spool or locks a mapping in
                    # memory, and for the end of a killed task, which releases its memory


class Patience:
    """A limit that Tracee.wait checks now and then. After `seconds` a wait ends with an error of class `kind`. check:
    raises Cancelled if the job was cancelled; called in waits that have lasted `grace` seconds.

    The cleanup afterwards waits for tasks as well, perhaps for the same one. All of it has CLEANUP seconds, and Cancel
    is ignored.
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
                          hint='check whether its cgroup is frozen, or a device or file system does not answer')


def stub_patience(check: Callable[[], None]) -> Patience:
    """Make the limit for stubs. They can be killed at any time, so a Cancel takes effect at once."""
    return Patience(LONG, check, kind=CkptError, grace=0)


def dying_patience() -> Patience:
    """Make the limit for tasks that were sent SIGKILL."""
    return Patience(LONG, _nothing, kind=CkptError)


def _nothing() -> None:
    """Ignore Cancel."""


def _whereabouts(tid: int) -> str:
    try:
        return f': state {read_stat(tid).state}, sleeps in {read_wchan(tid) or "nothing"}'
    except OSError:
        return ''

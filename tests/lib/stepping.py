# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that stops at each of its system calls, and what is true at each of these moments."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckptd.kernel.ptrace import PTRACE_EVENT_STOP, PTRACE_O_TRACESYSGOOD, SYSCALL_STOP, Tracee


def at_each_call(tid: int, look: Callable[[], object], begin: Callable[[], object]) -> int:
    """Look at the entry and at the exit of every system call of a thread, until it ends; how often that was.

    begin: what lets the thread go on from where it waits; done when it is traced, so that no call is missed. The thread
    does nothing while `look` runs, and the signals that it gets are its own. What `look` raises is raised here; the
    thread goes on by itself then.
    """
    stops = 0
    with _blocked_sigchld(), Tracee.seize(tid, PTRACE_O_TRACESYSGOOD) as tracee:
        tracee.interrupt()
        begin()
        try:
            while True:
                status = tracee.wait()
                number = os.WSTOPSIG(status)
                if number == SYSCALL_STOP:
                    stops += 1
                    look()
                # a stop by ptrace itself is no signal that could be delivered
                is_signal = number != SYSCALL_STOP and status >> 16 != PTRACE_EVENT_STOP
                tracee.to_syscall(number if is_signal and number != signal.SIGTRAP else 0)
        except ProcessLookupError:
            return stops


@contextmanager
def _blocked_sigchld() -> Iterator[None]:
    """Where it is not blocked, it is ignored and lost, and each wait for a stop takes its longest."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

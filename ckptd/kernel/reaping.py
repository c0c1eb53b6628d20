# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of tracees that were killed, which their tracer must see."""

import signal
import time
from collections.abc import Iterable
from contextlib import suppress

from ckptd.kernel.ptrace import Patience, Tracee, endless

_LOOK = 0.05        # seconds without a death after which a wait checks again


def wait_dead(tracees: Iterable[Tracee], patience: Patience = endless) -> None:
    """Wait until all are dead, and continue each from any stop before.

    They are waited for together. The leader of a process is reaped after its other threads, and the first process of a
    pid namespace ends after the tracer has reaped all others (kernel/pid_namespace.c, zap_pid_ns_processes).
    """
    left, began = list(tracees), time.monotonic()
    while left := [tracee for tracee in left if not _sees_death(tracee)]:
        signal.sigtimedwait({signal.SIGCHLD}, _LOOK)
        patience(left[0].tid, time.monotonic() - began)


def _sees_death(tracee: Tracee) -> bool:
    with suppress(ProcessLookupError):
        while tracee.attached and tracee.poll():
            tracee.cont()
    return not tracee.attached

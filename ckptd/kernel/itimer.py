# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interval timers of processor time (setitimer(2))."""

import signal
from functools import cache


@cache
def cpu_itimer_excess() -> int:
    """Return the microseconds that the kernel adds to an ITIMER_VIRTUAL or ITIMER_PROF, so that it never expires early.

    It is one tick, whose length is in no file (kernel/time/itimer.c, set_cpu_itimer), so it is measured with the
    caller's own timer.
    """
    wanted = 1000.0
    signal.setitimer(signal.ITIMER_VIRTUAL, wanted)
    left, _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    return max(0, round((left - wanted) * 1e6))

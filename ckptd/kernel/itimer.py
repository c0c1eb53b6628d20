# SPDX-License-Identifier: LGPL-2.1-or-later
"""Interval timers of processor time, setitimer(2)."""

import signal
from functools import cache


@cache
def cpu_itimer_excess() -> int:
    """Microseconds that the kernel adds to the value of an ITIMER_VIRTUAL or ITIMER_PROF, so that it never rings early:
    one tick, whose length no file tells (kernel/time/itimer.c, set_cpu_itimer). Tried on the caller's own timer."""
    wanted = 1000.0
    signal.setitimer(signal.ITIMER_VIRTUAL, wanted)
    left, _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
    return max(0, round((left - wanted) * 1e6))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""/proc/timer_list: every armed timer of all CPUs (kernel/time/timer_list.c). Readable by root only.

    cpu: 0
     clock 0:
      .index:      0
    active timers:
     #0: <00000000c0cabc68>, hrtimer_wakeup, S:01
     # expires at 1722151068049-1722251068049 nsecs [in 599888132995 to 599988132995 nsecs]
"""

import re
import time
from collections import Counter
from typing import NamedTuple

from ckptd.kernel.procfs import read_file

# bases by number, enum hrtimer_base_type of <linux/hrtimer_defs.h>; the second four are the same for soft interrupts
_CLOCKS = (time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, time.CLOCK_BOOTTIME, time.CLOCK_TAI)
_LINE = re.compile(rb'^ clock (\d+):|, hrtimer_wakeup, S:\w+\n # expires at (\d+)-\d+ nsecs', re.MULTILINE)


class End(NamedTuple):
    """The end of a sleep, in nanoseconds of CLOCK_*. It does not include slack that the kernel may add to serve several
    timers at once."""
    clock: int
    at: int


def read_sleeps() -> Counter[End]:
    """Read the end of every sleep in the kernel that has one, with the number of sleeps for each. PermissionError,
    FileNotFoundError."""
    return parse_sleeps(read_file('/proc/timer_list'))


def parse_sleeps(data: bytes) -> Counter[End]:
    """Parse the timers whose function is hrtimer_wakeup: those of nanosleep, poll, select, epoll_wait, futex and the
    like."""
    found: Counter[End] = Counter()
    clock = 0
    for base, soft in _LINE.findall(data):
        if base:
            clock = _CLOCKS[int(base) % len(_CLOCKS)]
        else:
            found[End(clock, int(soft))] += 1
    return found

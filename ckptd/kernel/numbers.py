# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which pids are in use, and by whom: a number is also taken by a session or group that is named by it."""

from contextlib import suppress

from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import pids, read_threads

Numbers = dict[int, str]


def numbers_in_use() -> Numbers:
    """'bash[100]' by number: processes, threads, and the numbers of groups and sessions that outlive their leaders."""
    found: Numbers = {}
    led: Numbers = {}
    for pid in pids():
        with suppress(ProcessLookupError):
            stat = read_stat(pid)
            name = f'{stat.comm}[{pid}]'
            found |= dict.fromkeys(read_threads(pid), name)
            for number, what in ((stat.pgrp, 'group'), (stat.session, 'session')):
                led.setdefault(number, f'{name}, whose {what} it is')
    led.pop(0, None)
    return led | found

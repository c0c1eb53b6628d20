# SPDX-License-Identifier: LGPL-2.1-or-later
"""A network for one test: no other program has its ports."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from ckptd.kernel.timens import setns, unshare

CLONE_NEWNET = 0x40000000       # <linux/sched.h>


@contextmanager
def own_network() -> Iterator[None]:
    """Put this thread, and what it starts, into a network namespace that has a loopback device only. It needs root."""
    old = os.open('/proc/self/ns/net', os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        try:
            subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
            yield
        finally:
            setns(old, CLONE_NEWNET)
    finally:
        os.close(old)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The extended registers as this processor and kernel have them, learnt from a child of our own."""

import time
from functools import cache

from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.trial import PATIENCE, Child


@cache
def own_xstate() -> bytes:
    """The XSAVE area of a fresh process (NT_X86_XSTATE): its size and XCR0 are those of every task here."""
    with Child() as child, Tracee.seize(child.pid) as tracee:
        tracee.stop(time.monotonic() + PATIENCE)
        return tracee.xstate()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that answer EINTR to any stop are issued again: the task is not to know that it was stopped.

Most interrupted calls are restarted by the kernel. A few are not, not even when no handler ran (signal(7),
"Interruption of system calls and library functions by stop signals"): a stop by a freezer or a tracer shows in them as
EINTR, which nobody has asked for and few programs expect. Nothing was done by such a call, so to issue it again changes
nothing, but that a timeout of it begins anew.
"""

from collections.abc import Mapping

from ckptd.engine.faults import fault
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import read_status


def issue_again(tracees: Mapping[int, Tracee]) -> None:
    """Do so for every stopped thread, unless a signal is about to run its handler: then EINTR is what it must see."""
    for tracee in tracees.values():
        regs = tracee.regs
        if arch.interrupted_for_good(regs) and not has_signal(tracee):
            tracee.regs = arch.again(regs)
    fault('issued-again')


def has_signal(tracee: Tracee) -> bool:
    """Whether one is pending that it does not block."""
    status = read_status(tracee.tid)
    return bool((status.sig_pnd | status.shd_pnd) & ~tracee.sigmask)

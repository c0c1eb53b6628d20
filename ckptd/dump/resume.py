# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that answer EINTR to any stop are issued again: the task is not to know that it was stopped.

Most interrupted calls are restarted by the kernel. A few are not, not even when no handler ran (signal(7),
"Interruption of system calls and library functions by stop signals"): a stop by a freezer or a tracer shows in them as
EINTR, which nobody has asked for and few programs expect. Nothing was done by such a call, so to issue it again changes
nothing, but that a timeout of it begins anew. Where the timeout is a register (epoll_wait) it becomes what is left: a
function of the C library has no more use for that register, and a program with the call in its own code, in a loop,
would go on with the rest, which is what it wants where the loop only sees to EINTR. Timeouts in memory stay whole.
"""

from collections.abc import Mapping
from contextlib import suppress

from ckptd.dump.waits import Wait, WaitNotes, set_timeout, wait_of
from ckptd.faults import fault
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.status import read_status
from ckptd.kernel.timens import host_monotonic_ns


def issue_again(tracees: Mapping[int, Tracee], notes: WaitNotes) -> dict[int, Wait]:
    """Do so for every stopped thread, unless a signal is about to run its handler: then EINTR is what it must see.
    Returns those whose call has a timeout, by tid."""
    waits = {}
    for tid, tracee in tracees.items():
        regs = tracee.regs
        if arch.interrupted_for_good(regs) and not has_signal(tracee):
            now = host_monotonic_ns()
            wait = wait_of(tid, regs, notes, now)
            after = arch.again(regs)
            if wait:
                waits[tid] = wait
                set_timeout(after, wait, now)
            tracee.regs = after
    fault('issued-again')
    return waits


def wait_on(tracees: Mapping[int, Tracee], waits: Mapping[int, Wait]) -> None:
    """Before the tasks run on: timeouts in registers have become shorter since."""
    now = host_monotonic_ns()
    for tid, wait in waits.items():
        with suppress(ProcessLookupError):      # killed by now, and none the worse for us
            regs = tracees[tid].regs
            set_timeout(regs, wait, now)
            tracees[tid].regs = regs


def has_signal(tracee: Tracee) -> bool:
    """Whether one is pending that it does not block."""
    status = read_status(tracee.tid)
    return bool((status.sig_pnd | status.shd_pnd) & ~tracee.sigmask)

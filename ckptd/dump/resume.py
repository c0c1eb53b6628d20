# SPDX-License-Identifier: LGPL-2.1-or-later
"""Issue system calls again that return EINTR after any stop, so that the task does not notice the stop.

The kernel restarts most interrupted calls. A few are not restarted, even if no handler ran (signal(7), "Interruption of
system calls and library functions by stop signals"). After a stop by a freezer or a tracer they return EINTR, which few
programs expect. Such a call has done nothing, so issuing it again changes nothing, except that its timeout begins
again. If the timeout is a register (epoll_wait), it is set to the remaining time. A function of the C library no longer
uses that register. A program with the call in its own code, in a loop, would continue with the remaining time, which is
right if the loop only handles EINTR. Timeouts in memory stay whole.
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
    """Issue such calls again in every stopped thread, unless a signal is about to run its handler: then the program
    must see EINTR. Return the calls that have a timeout, by tid."""
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
    """Reduce the timeouts in registers just before the tasks run on."""
    now = host_monotonic_ns()
    for tid, wait in waits.items():
        with suppress(ProcessLookupError):      # it was killed meanwhile, and nothing is lost
            regs = tracees[tid].regs
            set_timeout(regs, wait, now)
            tracees[tid].regs = regs


def has_signal(tracee: Tracee) -> bool:
    """Whether a signal is pending that the thread does not block."""
    status = read_status(tracee.tid)
    return bool((status.sig_pnd | status.shd_pnd) & ~tracee.sigmask)

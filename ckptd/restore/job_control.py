# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes that were in job-control stop, or are to be left stopped: the same group-stop, by the same signal."""

import os
import signal
from collections.abc import Sequence

from ckptd.kernel.ptrace import PTRACE_EVENT_STOP
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.restore.create import TaskBuilder
from ckptd.restore.creation_order import NewProcess

_P_PID = 1          # <linux/wait.h>


class Stops:
    """Which processes stop, and how. all_: every one, as by SIGSTOP."""

    def __init__(self, processes: Sequence[NewProcess], *, all_: bool) -> None:
        self._all = all_
        self._above = {child.vpid: process for process in processes for child in process.children}

    def signal_of(self, process: NewProcess) -> int:
        """The signal of the group-stop that it is to be in; 0 for none."""
        wanted = process.alive[0].record.stop_signal
        if not wanted:
            return signal.SIGSTOP if self._all else 0
        # the others stop no process whose group is orphaned (kernel/signal.c, get_signal), as that of a root is now
        above = self._above.get(process.vpid)
        return wanted if above and above.sid == process.sid and above.pgid != process.pgid else signal.SIGSTOP

    def stop(self, process: NewProcess, builder: TaskBuilder) -> None:
        """Its tasks have left their stubs, and its parent has not: that hears of it, as it had."""
        wanted = self.signal_of(process)
        for task in process.alive:
            stop(builder[task.vpid], wanted, begin=task is process.alive[0])
        if process.vpid in self._above and not process.alive[0].record.exit_code & 0x7F:
            # its parent has waited for it then (fs/proc/array.c: exit_code is the signal until somebody has)
            script = Script(builder[process.parent])
            script.call('waitid', _P_PID, process.vpid, 0, os.WSTOPPED | os.WNOHANG, 0)
            script.do()


def stop(stub: Stub, wanted: int, *, begin: bool) -> None:
    """Have a task that left its stub take part in a group-stop by the signal `wanted`, which its first one begins.

    Nothing but that is let in meanwhile; the task's own signal mask is back at the end.
    """
    tracee = stub.tracee
    mask = tracee.sigmask
    tracee.sigmask = (1 << 64) - 1 & ~(1 << wanted - 1)
    if begin:
        # SIGSTOP is the one that no mask keeps out; at its delivery it becomes the one that is wanted
        os.kill(stub.tid, signal.SIGSTOP)
    sig = 0
    while True:
        tracee.cont(sig)
        status = stub.wait()
        if status >> 16 == PTRACE_EVENT_STOP and os.WSTOPSIG(status) != signal.SIGTRAP:
            break
        sig = wanted if os.WSTOPSIG(status) == signal.SIGSTOP else 0
    tracee.sigmask = mask

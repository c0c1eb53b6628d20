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
_BY_TERMINAL = frozenset({signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})


class Stops:
    """The processes that stop, with their signals. all_: every one, as by SIGSTOP.

    A stop signal other than SIGSTOP stops no process whose group is orphaned (kernel/signal.c, get_signal). No member
    of such a group has its parent in another group of the same session (kernel/exit.c, will_become_orphaned_pgrp). A
    process may have been stopped before its group became orphaned, or before it joined the group. If its parent is in
    the same group, the two are in different groups for the moment of the stop.
    """

    def __init__(self, processes: Sequence[NewProcess], *, all_: bool) -> None:
        self._all = all_
        self._above = {child.vpid: process for process in processes for child in process.children}
        # (session, group) of those that are not orphaned
        self._anchored = {(child.sid, child.pgid) for process in processes for child in process.children
                          if process.alive and child.alive and _anchors(process, child)}

    def signal_of(self, process: NewProcess) -> int:
        """Return the signal of the group-stop for a process; 0 for none."""
        wanted = process.alive[0].record.stop_signal
        if not wanted:
            return signal.SIGSTOP if self._all else 0
        if wanted not in _BY_TERMINAL:
            return signal.SIGSTOP
        return wanted if self._is_anchored(process) or self._apart(process) else signal.SIGSTOP

    def _is_anchored(self, process: NewProcess) -> bool:
        return (process.sid, process.pgid) in self._anchored

    def _apart(self, process: NewProcess) -> int:
        """Return the process, this one or its parent, that is to be in a group of its own for a moment, so that the two
        are in different groups; 0 for none."""
        above = self._above.get(process.vpid)
        if above is None or not above.alive or above.sid != process.sid or process.vpid == process.sid:
            return 0
        # a leader cannot leave its group, and only one of the two is the leader
        return process.vpid if process.vpid != process.pgid else above.vpid

    def stop(self, process: NewProcess, builder: TaskBuilder) -> None:
        """Stop a process whose tasks have left their stubs, while its parent is still a stub. The parent is notified of
        the stop unless it had already waited for it."""
        wanted = self.signal_of(process)
        apart = 0 if wanted == signal.SIGSTOP or self._is_anchored(process) else self._apart(process)
        # setpgid(2) accepts a child of the caller that has not executed a program, which no task of a restart has
        self._join(process, builder, apart, apart)
        for task in process.alive:
            stop(builder[task.vpid], wanted, begin=task is process.alive[0])
        self._join(process, builder, apart, process.pgid)
        if process.vpid in self._above and not process.alive[0].record.exit_code & 0x7F:
            # its parent had waited for it (fs/proc/array.c: exit_code is the signal until then)
            script = Script(builder[process.parent])
            script.call('waitid', _P_PID, process.vpid, 0, os.WSTOPPED | os.WNOHANG, 0)
            script.do()

    def _join(self, process: NewProcess, builder: TaskBuilder, vpid: int, pgid: int) -> None:
        """Let the parent put a process, its child or itself, into a group. Do nothing for vpid 0."""
        if vpid:
            script = Script(builder[process.parent])
            script.call('setpgid', vpid, pgid, about='process group of a stopped process')
            script.do()


def _anchors(parent: NewProcess, child: NewProcess) -> bool:
    """Whether a parent keeps the group of its child from being orphaned."""
    return parent.sid == child.sid and parent.pgid != child.pgid


def stop(stub: Stub, wanted: int, *, begin: bool) -> None:
    """Let a task that left its stub take part in a group-stop by the signal `wanted`, which its first task begins.

    No other signal is let in meanwhile. The task's own signal mask is restored at the end.
    """
    tracee = stub.tracee
    mask = tracee.sigmask
    tracee.sigmask = (1 << 64) - 1 & ~(1 << wanted - 1)
    if begin:
        # SIGSTOP cannot be blocked; at its delivery it is replaced by the wanted signal
        os.kill(stub.tid, signal.SIGSTOP)
    sig = 0
    while True:
        tracee.cont(sig)
        status = stub.wait()
        if status >> 16 == PTRACE_EVENT_STOP and os.WSTOPSIG(status) != signal.SIGTRAP:
            break
        sig = wanted if os.WSTOPSIG(status) == signal.SIGSTOP else 0
    tracee.sigmask = mask

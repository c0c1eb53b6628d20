# SPDX-License-Identifier: LGPL-2.1-or-later
"""The nice value of the autogroup of a session (sched(7)). Each session is made with a new group, so the leader keeps
the value for all its processes. It is set from outside."""

import os
import time

from ckptd.errors import Finding, errno_name
from ckptd.image.grammar import U8, Struct, layout
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.sched import read_autogroup_nice, write_autogroup_nice
from ckptd.objects.attributes.base import Attribute, DumpedTask, RestoredTask, Scope, Stage, about
from ckptd.objects.support import Support

_LOWEST = -20       # 0 in the record
# Without CAP_SYS_ADMIN only one value is set in a tenth of a second, on the whole machine; then EAGAIN
# (kernel/sched/autogroup.c, proc_sched_autogroup_set_nice). Nothing tells when that time is over.
_INTERVAL, _ATTEMPTS = 0.11, 5


@layout
class Autogroup(Struct):
    """A group. nice: 0..39 (nice value + 20)."""
    nice: U8


class AutogroupAttribute(Attribute[Autogroup, int], name='autogroup', scope=Scope.PROCESS, stage=Stage.LIMITS):
    support = Support('nice value of the autogroup of a session', warned='a value that may not be set')

    def look(self, tracee: Tracee) -> int:
        return read_autogroup_nice(tracee.tid) if os.getsid(tracee.tid) == tracee.tid else 0

    def dump(self, of: DumpedTask, answer: int) -> Autogroup | None:
        return Autogroup(answer - _LOWEST) if answer else None

    def restore(self, record: Autogroup, to: RestoredTask) -> None:
        if to.sid != to.vpid:       # it has joined a session of the restart, whose group keeps its value
            return
        nice = record.nice + _LOWEST
        for attempt in range(_ATTEMPTS):
            try:
                write_autogroup_nice(to.tid, nice)
            except BlockingIOError:
                if attempt < _ATTEMPTS - 1:
                    time.sleep(_INTERVAL)
                    continue
                to.means.warn(_lost(to.vpid, nice, 'EAGAIN'))
            except OSError as error:
                # EPERM below the limit RLIMIT_NICE
                to.means.warn(_lost(to.vpid, nice, errno_name(error.errno or 0)))
            return


def _lost(vpid: int, nice: int, errno: str) -> Finding:
    return about(vpid, 'autogroup', errno, f'the nice value of its autogroup was {nice}, and cannot be set again',
                 'it is 0 now; restore it as root', 'warning')

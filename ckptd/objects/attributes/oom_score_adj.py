# SPDX-License-Identifier: LGPL-2.1-or-later
"""oom_score_adj of a process (proc_pid_oom_score_adj(5))."""

import os
from collections.abc import Iterable

from ckptd.errors import Finding
from ckptd.image.reader import ImageTask
from ckptd.image.records import ProcessState
from ckptd.kernel.creds import CAP_SYS_RESOURCE
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.task import read_oom_score_adj
from ckptd.objects.attributes.allowed import Allowed
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    Fields,
    RestartRights,
    RestoredTask,
    Scope,
    Stage,
    about,
)
from ckptd.objects.support import Support

_LOWEST = -1000     # 0 in the record


class OomScoreAdj(Attribute[ProcessState, int], name='oom_score_adj', scope=Scope.PROCESS, stage=Stage.LIMITS):
    support = Support('oom_score_adj',
                      user='a lower value than that of the restart is refused; --clamp accepts the nearest')

    def look(self, tracee: Tracee) -> int:
        return read_oom_score_adj(tracee.tid)

    def dump(self, of: DumpedTask, answer: int) -> Fields:
        return {'oom_score_adj': answer - _LOWEST}

    def obstacles(self, record: ProcessState, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        wanted, nearest = record.oom_score_adj + _LOWEST, _nearest(record, rights.allowed)
        if wanted != nearest:
            yield rights.beyond(about(record.vpid, 'oom_score_adj', 'EACCES', f'its oom_score_adj is {wanted}, ours '
                                      f'{read_oom_score_adj(os.getpid())}, and lowering it takes a privilege',
                                      'run ckptd with CAP_SYS_RESOURCE (systemd: OOMScoreAdjust=)'), f'with {nearest}')

    def restore(self, record: ProcessState, to: RestoredTask) -> None:
        wanted = _nearest(record, to.means.allowed)
        with open(f'/proc/{to.tid}/oom_score_adj', 'rb+', buffering=0) as file:  # noqa: PTH123
            if int(file.read(16)) != wanted:
                file.write(str(wanted).encode())


def _nearest(record: ProcessState, allowed: Allowed) -> int:
    wanted, own = record.oom_score_adj + _LOWEST, read_oom_score_adj(os.getpid())
    may = wanted >= own or allowed.may(CAP_SYS_RESOURCE) or _can_lower(wanted)
    return wanted if may else own


def _can_lower(value: int) -> bool:
    """Try the value and restore the old one. The kernel allows values down to oom_score_adj_min (fs/proc/base.c), which
    no file shows."""
    own = read_oom_score_adj(os.getpid())
    try:
        _set(value)
    except OSError:
        return False
    _set(own)
    return True


def _set(value: int) -> None:
    fd = os.open('/proc/self/oom_score_adj', os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Resource limits of a process (prlimit(2)). They are read from /proc, because prlimit(2) on a task of another uid
needs CAP_SYS_RESOURCE. They are set from outside while the stub has our ids: then only a higher hard limit needs a
right."""

from collections.abc import Iterable
from functools import lru_cache

from ckptd.errors import Finding
from ckptd.image.reader import ImageTask
from ckptd.image.records import Limit, Limits
from ckptd.kernel.prlimit import read_limit, set_limit
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.task import parse_limits, read_limits_file
from ckptd.objects.attributes.allowed import INFINITY, NOFILE, nr_open
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    RestartRights,
    RestoredTask,
    Scope,
    Stage,
    about,
)
from ckptd.objects.support import Support

# by number, <asm-generic/resource.h>
_NAMES = ('CPU', 'FSIZE', 'DATA', 'STACK', 'CORE', 'RSS', 'NPROC', 'NOFILE', 'MEMLOCK', 'AS', 'LOCKS', 'SIGPENDING',
          'MSGQUEUE', 'NICE', 'RTPRIO', 'RTTIME')
_HINT = 'run ckptd with CAP_SYS_RESOURCE, or with limits as high (ulimit -H, systemd: Limit{}=)'


class ResourceLimits(Attribute[Limits, bytes], name='limits', scope=Scope.PROCESS, stage=Stage.LIMITS):
    support = Support('resource limits',
                      refused='higher hard limits than those of the restart, without CAP_SYS_RESOURCE; --clamp '
                              'accepts the nearest')

    def look(self, tracee: Tracee) -> bytes:
        return read_limits_file(tracee.tid)

    def dump(self, of: DumpedTask, answer: bytes) -> Limits:
        return Limits(of.process.leader.vtid, _decoded(answer))

    def obstacles(self, record: Limits, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        vpid = record.vpid
        for name, limit, nearest in zip(_NAMES, record.limits, rights.allowed.limits(vpid), strict=False):
            if limit == nearest:
                continue
            reason, comes = f'its hard limit RLIMIT_{name} is {_amount(limit.hard)}', f'with {_amount(nearest.hard)}'
            if name == _NAMES[NOFILE] and limit.hard > nr_open() == nearest.hard:
                yield rights.beyond(about(vpid, 'RLIMIT_NOFILE', 'EPERM', f'{reason}, and this machine has at most '
                                          f'{nr_open()}', 'raise the sysctl fs.nr_open'), comes)
            else:
                yield rights.beyond(about(vpid, f'RLIMIT_{name}', 'EPERM', f'{reason}, ours {_amount(nearest.hard)}',
                                          _HINT.format(name)), comes)

    def restore(self, record: Limits, to: RestoredTask) -> None:
        for number, limit in enumerate(to.means.allowed.limits(record.vpid)):
            if read_limit(to.tid, number) != (limit.soft, limit.hard):
                set_limit(to.tid, number, limit.soft, limit.hard)


@lru_cache(maxsize=64)      # forked children have their parent's limits
def _decoded(data: bytes) -> tuple[Limit, ...]:
    return tuple(Limit(soft, hard) for soft, hard in parse_limits(data))


def _amount(value: int) -> str:
    return 'unlimited' if value == INFINITY else f'{value:,}'

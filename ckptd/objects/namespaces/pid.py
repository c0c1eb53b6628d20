# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pid namespaces (pid_namespaces(7)).

A new one is requested (--new-pidns), or made because an ordinary user may choose pids in no other. Only a child can
enter it, so restore/create.py makes it with the first task. Its first process is a few instructions that reap orphans,
unless the tree has a process 1 of its own.
"""

from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import Namespace
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.creds import CAP_CHECKPOINT_RESTORE, CAP_SYS_ADMIN, capget
from ckptd.kernel.memory import Mem
from ckptd.kernel.prctl import PR_SET_NAME
from ckptd.objects.attributes.base import about
from ckptd.objects.namespaces.base import FOR_CHILDREN, BirthNamespaces, NamespaceKind
from ckptd.objects.support import Support
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub


class PidNamespace(NamespaceKind, name='pid'):
    """A pid namespace."""
    support = Support('pid', warned='/proc is that of the outer namespace')

    def complete(self, links: dict[str, int]) -> None:
        if self.name in links:
            # a new pid namespace has no link before its first process is in it (kernel/pid_namespace.c)
            links.setdefault(self.name + FOR_CHILDREN, 0)

    def is_lost(self, one: Namespace, birth: BirthNamespaces) -> bool:
        return not one.own and not birth.pid

    def restart_findings(self, one: Namespace, vpid: int, birth: BirthNamespaces, *, is_ours: bool
                         ) -> Iterator[Finding]:
        if self.is_lost(one, birth):
            yield about(vpid, 'namespace pid', 'EOPNOTSUPP', 'was in another pid namespace, of which its manifest says '
                        'nothing', 'restore it with --new-pidns')


def may_choose_pids() -> bool:
    """Whether clone3(2) accepts set_tid from us in our own pid namespace."""
    effective = capget().effective
    return bool(effective >> CAP_CHECKPOINT_RESTORE & 1 or effective >> CAP_SYS_ADMIN & 1)


def make_reaper(init: Stub, root: int, root_directory: int) -> None:
    """Turn the first process of a pid namespace into one that reaps orphans and exits like `root`. Afterwards it is
    before its first instruction, and has only its two pages."""
    script = Script(init)
    script.call('prctl', PR_SET_NAME, b'ckptd-init\0')
    script.call('fchdir', root_directory)
    script.call('close_range', 0, (1 << 32) - 1, 0)
    script.do()
    with Mem(init.tid) as mem:
        mem.write(init.arena.code, arch.reaper(root))
    init.tracee.regs = arch.stub_registers(init.arena.code, init.arena.table, stack=init.arena.end - 256)

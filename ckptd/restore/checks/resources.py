# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check memory that needs a privilege: locked memory, or at the lowest addresses."""

from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import Vma
from ckptd.kernel.creds import CAP_SYS_RAWIO
from ckptd.kernel.procfs import read_file
from ckptd.objects.attributes.allowed import MEMLOCK
from ckptd.restore.checks.context import CheckContext, about

_AS_ROOT = 'restore it as root'


def check(context: CheckContext) -> Iterator[Finding]:
    for process in context.plan.processes:
        if process.alive:
            yield from _locked(context, process.vpid, process.ids.mm_id)
    yield from _lowest(context)


def _locked(context: CheckContext, vpid: int, mm_id: int) -> Iterator[Finding]:
    vmas = [vma for vma in context.reader.memory(mm_id).vmas if vma.locked]
    if unlocked := sum(vma.end - vma.start for vma in vmas if vma.start not in context.allowed.locked(vpid, vmas)):
        locked = sum(vma.end - vma.start for vma in vmas)
        limit = context.allowed.limits(vpid)[MEMLOCK].soft
        yield context.beyond(about(vpid, 'locked memory', 'EPERM', f'has {locked:,} bytes of memory locked, and may '
                                   f'lock {limit:,}', 'run ckptd with CAP_IPC_LOCK'),
                             f'with {locked - unlocked:,} bytes locked')


def _lowest(context: CheckContext) -> Iterator[Finding]:
    """Check mappings at addresses that the kernel denies to users: a kernel bug that follows a null pointer would use
    data that they have put there (security/commoncap.c, cap_mmap_addr)."""
    least, users = int(read_file('/proc/sys/vm/mmap_min_addr')), context.plan.users('mm_id')
    for vma in context.reader.every(Vma):
        if vma.start < least and vma.mm_id in users and not context.lookup.capable(CAP_SYS_RAWIO):
            yield about(users[vma.mm_id], f'vma {vma.start:x}-{vma.end:x}', 'EPERM', 'is mapped below address '
                        f'{least:#x} (sysctl vm.mmap_min_addr), which takes CAP_SYS_RAWIO', _AS_ROOT)

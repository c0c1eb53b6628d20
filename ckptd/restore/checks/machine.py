# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check that this machine and its kernel can run the image: architecture, xstate, vdso, features."""

import mmap
import os
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import PAGE, VDSO, GuardRegions, Registers, Vma
from ckptd.kernel.arch import x86_64 as arch
from ckptd.kernel.mman import MADV_GUARD_INSTALL, MAP_DROPPABLE
from ckptd.restore.checks.context import CheckContext, about
from ckptd.restore.vdso import VdsoPlan
from ckptd.restore.xstate import own_xstate, shortcoming

ARCHITECTURE = 'x86-64'


def check(context: CheckContext) -> Iterator[Finding]:
    other = list(_architecture(context))
    yield from other
    if not other:       # for another machine nothing else is meaningful
        yield from _xstate(context)
        yield from _vdso(context)
        yield from _features(context)


def _architecture(context: CheckContext) -> Iterator[Finding]:
    header, hint = context.reader.header, 'restore it on a machine of the same architecture'
    machines = {one.machine for one in context.reader.every(Registers)} - {arch.EM}
    if context.reader.manifest.architecture != ARCHITECTURE or header.machine != os.uname().machine:
        yield about(0, 'architecture', 'EOPNOTSUPP', f'the image was made on {header.machine} '
                    f'({context.reader.manifest.architecture}), this one is {os.uname().machine}', hint)
    elif machines:
        yield about(0, 'architecture', 'EOPNOTSUPP', f'the image has registers of ELF machine {min(machines)}, not '
                    f'{arch.EM}', hint)
    if header.page_size != os.sysconf('SC_PAGE_SIZE') or header.page_size != PAGE:
        yield about(0, 'page size', 'EOPNOTSUPP', f'the image has pages of {header.page_size} bytes, this kernel of '
                    f'{os.sysconf("SC_PAGE_SIZE")}', hint)


def _xstate(context: CheckContext) -> Iterator[Finding]:
    """Check the register state. PTRACE_SETREGSET accepts the area only in the size for this processor
    (arch/x86/kernel/fpu/regset.c, xstateregs_set), and a component that XCR0 lacks causes a #GP."""
    for task in context.plan.alive:
        reason = shortcoming(context.reader.get(Registers, task.vpid).xstate, own_xstate())
        if reason:      # they are alike in one image
            yield about(task.vpid, 'xstate', 'EOPNOTSUPP', reason, 'restore it on a processor with the features of '
                        f'the one that it was dumped on (kernel {context.reader.manifest.kernel})')
            return


def _vdso(context: CheckContext) -> Iterator[Finding]:
    """Check the vdso. On another kernel its functions become jumps, so a task inside one would continue in the middle
    of a jump."""
    reader, plan = context.reader, VdsoPlan(0)
    for mm_id, user in context.plan.users('mm_id').items():
        memory = reader.memory(mm_id)
        if not plan.is_bridged(reader, memory):
            continue
        kernel = reader.manifest.kernel
        yield about(user, 'vdso', 'ENOSYS', f'its vdso is that of kernel {kernel}: calls are redirected to that of '
                    'this kernel', 'each call takes one more jump', 'warning')
        [text] = [vma for vma in memory.vmas if vma.kind == VDSO][:1]
        for task in context.plan.alive:
            registers = arch.user_regs_struct.from_buffer_copy(reader.get(Registers, task.vpid).gpr)
            if task.record.mm_id == mm_id and text.start <= registers.rip < text.end:
                yield about(task.vpid, 'vdso', 'EOPNOTSUPP', 'stands inside a function of the vdso, which another '
                            'kernel does not have', f'boot kernel {kernel} again, or checkpoint at another moment')


def _features(context: CheckContext) -> Iterator[Finding]:
    reader, users = context.reader, context.plan.users('mm_id')
    guarded = next((one.mm_id for one in reader.every(GuardRegions) if one.ranges), 0)
    if guarded and not _has_guard_regions():
        yield _lacking(users.get(guarded, 0), 'guard regions (madvise MADV_GUARD_INSTALL)', '6.13')
    droppable = next((one.mm_id for one in reader.every(Vma) if one.flags & MAP_DROPPABLE), 0)
    if droppable and not _has_droppable_memory():
        yield _lacking(users.get(droppable, 0), 'droppable memory (MAP_DROPPABLE)', '6.11')


def _lacking(vpid: int, what: str, since: str) -> Finding:
    return about(vpid, 'kernel', 'ENOSYS', f'uses {what}, which this kernel lacks',
                 f'boot a kernel {since} or newer')


def _has_guard_regions() -> bool:
    with mmap.mmap(-1, PAGE) as page:
        try:
            page.madvise(MADV_GUARD_INSTALL)
        except OSError:
            return False
    return True


def _has_droppable_memory() -> bool:
    try:
        mmap.mmap(-1, PAGE, flags=MAP_DROPPABLE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True

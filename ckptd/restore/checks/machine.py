# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check that this machine and its kernel can run the image: architecture, xstate, and what its mappings need."""

import os
from collections.abc import Iterator

from ckptd.errors import Finding
from ckptd.image.records import PAGE, Registers
from ckptd.kernel.arch import x86_64 as arch
from ckptd.objects.mappings.registry import lacks
from ckptd.restore.checks.context import CheckContext, about
from ckptd.restore.xstate import own_xstate, shortcoming

ARCHITECTURE = 'x86-64'


def check(context: CheckContext) -> Iterator[Finding]:
    other = list(_architecture(context))
    yield from other
    if not other:       # for another machine nothing else is meaningful
        yield from _xstate(context)
        yield from lacks(context)


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

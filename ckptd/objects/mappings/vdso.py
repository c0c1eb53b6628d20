# SPDX-License-Identifier: LGPL-2.1-or-later
"""The vdso and its relatives, which belong to the kernel."""

from ckptd.image.records import VDSO, VSYSCALL, VVAR
from ckptd.objects.mappings.base import PrivateMemoryKind


class VdsoMapping(PrivateMemoryKind, numbers=[VDSO], names=['[vdso]']):
    """The text of the vdso. The image has it for debuggers, and for a restart on another kernel."""
    is_kernels = True
    keeps_all_pages = True


class VvarMapping(PrivateMemoryKind, numbers=[VVAR], names=['[vvar]', '[vvar_vclock]']):
    """The data of the vdso, before its text."""
    is_kernels = True


class VsyscallMapping(PrivateMemoryKind, numbers=[VSYSCALL], names=['[vsyscall]']):
    """The page of old system calls, above the addresses of programs."""
    is_kernels = True

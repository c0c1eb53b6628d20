# SPDX-License-Identifier: LGPL-2.1-or-later
"""mseal(2), and constants of mmap(2) and its relatives that the module mmap lacks, from <linux/mman.h>."""

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_size_t, c_ulong, syscall

MAP_DROPPABLE = 0x08                # since 6.11
MAP_LOCKED, MAP_NORESERVE = 0x2000, 0x4000
MAP_HUGETLB, MAP_HUGE_SHIFT = 0x40000, 26
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MCL_FUTURE, MCL_ONFAULT = 2, 4
MLOCK_ONFAULT = 1
MADV_POPULATE_WRITE = 23
MADV_GUARD_INSTALL = 102            # since 6.13


def huge_page_flags(size: int) -> int:
    """Return the bits of mmap(2), memfd_create(2) and shmget(2) for huge pages of this size in bytes."""
    return (size.bit_length() - 1 & 0x3F) << MAP_HUGE_SHIFT


@syscall(NR['mseal'])
def mseal(start: c_ulong, length: c_size_t, flags: c_ulong = 0) -> c_int:
    """Forbid any later change of mappings, since 6.10. It cannot be undone."""

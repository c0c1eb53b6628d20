# SPDX-License-Identifier: LGPL-2.1-or-later
"""Constants of mmap(2) and its relatives that the module mmap lacks, from <linux/mman.h>."""

MAP_DROPPABLE = 0x08                # since 6.11
MAP_LOCKED = 0x2000
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MCL_FUTURE, MCL_ONFAULT = 2, 4
MLOCK_ONFAULT = 1
MADV_POPULATE_WRITE = 23
MADV_GUARD_INSTALL = 102            # since 6.13

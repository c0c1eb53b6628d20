# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memfds that are to have a certain mode and certain seals, memfd_create(2)."""

import errno
import os
from pathlib import Path

from ckptd.kernel.mman import huge_page_flags

# <linux/memfd.h>, <linux/fcntl.h>, since 6.3
MFD_NOEXEC_SEAL, MFD_EXEC = 0x08, 0x10
F_SEAL_EXEC = 0x20
_FORBIDDEN = b'2'       # of vm.memfd_noexec: every memfd that is not made with MFD_NOEXEC_SEAL is EACCES


def make_memfd(name: str, mode: int, seals: int, huge: int = 0) -> int:
    """Make an empty memfd that can be given this mode and these seals. Its own are the kernel's defaults. huge: size of
    its pages in bytes, if they are huge pages.

    A call that says neither MFD_EXEC nor MFD_NOEXEC_SEAL gets what vm.memfd_noexec chooses (mm/memfd.c,
    check_sysctl_memfd_noexec), so this says which one it wants. F_SEAL_EXEC freezes the permission to execute, so a
    memfd that is made with it cannot be made executable.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB | huge_page_flags(huge) if huge else 0)
    try:
        return os.memfd_create(name, flags | (MFD_EXEC if _may_execute(mode, seals) else MFD_NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:     # a kernel before 6.3 knows neither
            raise
    return os.memfd_create(name, flags)


def is_forbidden(mode: int, seals: int) -> bool:
    """Whether vm.memfd_noexec of this pid namespace keeps everybody from making such a memfd."""
    try:
        setting = Path('/proc/sys/vm/memfd_noexec').read_bytes()
    except FileNotFoundError:       # before 6.3
        return False
    return setting.strip() == _FORBIDDEN and _may_execute(mode, seals)


def _may_execute(mode: int, seals: int) -> bool:
    return bool(mode & 0o111) or not seals & F_SEAL_EXEC

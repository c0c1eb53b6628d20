# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compare kernel objects of two tasks (kcmp(2))."""

import ctypes
import struct

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_long, c_ulong, syscall

# <linux/kcmp.h>
KCMP_FILE = 0
KCMP_VM = 1
KCMP_FILES = 2
KCMP_FS = 3
KCMP_SIGHAND = 4
KCMP_IO = 5
KCMP_SYSVSEM = 6
KCMP_EPOLL_TFD = 7

_EPOLL_SLOT = struct.Struct('=III')     # struct kcmp_epoll_slot {__u32 efd, tfd, toff;}

EQUAL, LESS, GREATER, UNEQUAL = 0, 1, 2, 3      # UNEQUAL: the order is unknown; only on kernels that hide it


@syscall(NR['kcmp'])
def _kcmp(pid1: c_int, pid2: c_int, type: c_int, idx1: c_ulong, idx2: c_ulong) -> c_long: ...


def kcmp(pid1: int, pid2: int, type: int) -> int:
    """Return EQUAL, LESS or GREATER for the KCMP_* object of two tasks. The order is random but constant until reboot,
    so it can be used for sorting.

    PermissionError without PTRACE_MODE_READ access to both, which is checked with the caller's real ids.
    """
    return _kcmp(pid1, pid2, type, 0, 0)


def kcmp_file(pid1: int, fd1: int, pid2: int, fd2: int) -> int:
    """Compare the open file descriptions of two fds. OSError EBADF if one is not open."""
    return _kcmp(pid1, pid2, KCMP_FILE, fd1, fd2)


def kcmp_epoll(pid1: int, fd1: int, pid2: int, epoll: int, tfd: int, nth: int) -> int:
    """Compare fd1 with the file that the epoll of pid2 watches under the number `tfd`; with its nth one (from 0) if
    there are several.

    OSError EBADF if fd1 is not open, ENOENT if the epoll has no such target.
    """
    slot = ctypes.create_string_buffer(_EPOLL_SLOT.pack(epoll, tfd, nth), _EPOLL_SLOT.size)
    return _kcmp(pid1, pid2, KCMP_EPOLL_TFD, fd1, ctypes.addressof(slot))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which kernel objects two tasks share, kcmp(2)."""

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

EQUAL, LESS, GREATER, UNEQUAL = 0, 1, 2, 3      # UNEQUAL: no order known, only of kernels that hide it


@syscall(NR['kcmp'])
def _kcmp(pid1: c_int, pid2: c_int, type: c_int, idx1: c_ulong, idx2: c_ulong) -> c_long: ...


def kcmp(pid1: int, pid2: int, type: int) -> int:
    """EQUAL, LESS or GREATER for the KCMP_* object of two tasks. The order is random but lasts until reboot, so sorts.

    PermissionError without PTRACE_MODE_READ access to both, decided with the caller's real ids.
    """
    return _kcmp(pid1, pid2, type, 0, 0)


def kcmp_file(pid1: int, fd1: int, pid2: int, fd2: int) -> int:
    """The same for the open file descriptions of two fds. OSError EBADF if one is not open."""
    return _kcmp(pid1, pid2, KCMP_FILE, fd1, fd2)


def kcmp_epoll(pid1: int, fd1: int, pid2: int, epoll: int, tfd: int, nth: int) -> int:
    """The same for fd1 and what the epoll of pid2 watches under the number `tfd`, the nth (from 0) if it is several.

    OSError EBADF if fd1 is not open, ENOENT if the epoll has no such target.
    """
    slot = ctypes.create_string_buffer(_EPOLL_SLOT.pack(epoll, tfd, nth), _EPOLL_SLOT.size)
    return _kcmp(pid1, pid2, KCMP_EPOLL_TFD, fd1, ctypes.addressof(slot))

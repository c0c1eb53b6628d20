# SPDX-License-Identifier: LGPL-2.1-or-later
"""prlimit(2). The module resource takes limits for signed numbers, and some programs have set larger ones."""

import ctypes

from ckptd.kernel.decl import c_int, c_void_p, cstruct, libc, u64


@cstruct(size=16)
class rlimit64(ctypes.Structure):
    """<linux/resource.h>"""
    rlim_cur: u64
    rlim_max: u64


@libc
def _prlimit(pid: c_int, resource: c_int, new_limit: c_void_p, old_limit: c_void_p) -> c_int: ...


def read_limit(pid: int, number: int) -> tuple[int, int]:
    """Return (soft, hard) of RLIMIT_* `number`; 2**64 - 1 for no limit."""
    limit = rlimit64()
    _prlimit(pid, number, None, ctypes.addressof(limit))
    return limit.rlim_cur, limit.rlim_max


def set_limit(pid: int, number: int, soft: int, hard: int) -> None:
    """Set a limit. PermissionError: a higher hard limit without CAP_SYS_RESOURCE."""
    limit = rlimit64(soft, hard)
    _prlimit(pid, number, ctypes.addressof(limit), None)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The robust futex list of a thread (get_robust_list(2))."""

import ctypes

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_long, c_void_p, syscall


@syscall(NR['get_robust_list'])
def _get_robust_list(pid: c_int, head_ptr: c_void_p, len_ptr: c_void_p) -> c_long: ...


def get_robust_list(tid: int) -> tuple[int, int]:
    """Return the address of the head and its size in bytes; 0 if the thread has none. Needs PTRACE_MODE_READ access."""
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    _get_robust_list(tid, ctypes.byref(head), ctypes.byref(length))
    return head.value, length.value

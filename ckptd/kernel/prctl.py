# SPDX-License-Identifier: LGPL-2.1-or-later
"""prctl(2): its options and their values, from <linux/prctl.h>."""

import ctypes

from ckptd.kernel.decl import c_int, c_ulong, libc

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_GET_KEEPCAPS, PR_SET_KEEPCAPS = 7, 8
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_GET_TSC, PR_SET_TSC, PR_TSC_ENABLE = 25, 26, 1
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30
PR_MCE_KILL, PR_MCE_KILL_GET, PR_MCE_KILL_SET, PR_MCE_KILL_DEFAULT = 33, 34, 1, 2
PR_SET_MM, PR_SET_MM_MAP = 35, 14
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_SET_NO_NEW_PRIVS = 38
PR_GET_TID_ADDRESS = 40
PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 47, 2, 4
PR_GET_SPECULATION_CTRL, PR_SET_SPECULATION_CTRL = 52, 53
PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_L1D_FLUSH = 0, 1, 2
PR_SPEC_PRCTL = 1
PR_SET_IO_FLUSHER, PR_GET_IO_FLUSHER = 57, 58
PR_SET_MDWE, PR_GET_MDWE = 65, 66                               # since 6.3
PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 67, 68               # since 6.4, with CONFIG_KSM
PR_TIMER_CREATE_RESTORE_IDS = 77                                # since 6.15
PR_SCHED_CORE, PR_SCHED_CORE_GET, PR_SCHED_CORE_SCOPE_THREAD = 62, 0, 0         # since 5.14
PR_FUTEX_HASH, PR_FUTEX_HASH_SET_SLOTS, PR_FUTEX_HASH_GET_SLOTS = 78, 1, 2      # since 6.17
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0
PR_SET_PTRACER = 0x59616D61


@libc
def prctl(option: c_int, arg2: c_ulong = 0, arg3: c_ulong = 0, arg4: c_ulong = 0, arg5: c_ulong = 0) -> c_int: ...


def core_cookie(tid: int) -> int:
    """Return the cookie of core scheduling of a task; 0 for none, for a task that is gone or may not be inspected, and
    where the kernel or the processor has no core scheduling (Documentation/admin-guide/hw-vuln/core-scheduling.rst)."""
    cookie = ctypes.c_uint64()
    try:
        prctl(PR_SCHED_CORE, PR_SCHED_CORE_GET, tid, PR_SCHED_CORE_SCOPE_THREAD, ctypes.addressof(cookie))
    except OSError:
        return 0
    return int(cookie.value)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Scheduling attributes of a thread: sched_getattr(2), ioprio_get(2), and autogroups. Affinity:
os.sched_getaffinity."""

import ctypes
from pathlib import Path
from typing import NamedTuple

from ckptd.kernel.arch.x86_64 import NR
from ckptd.kernel.decl import c_int, c_uint, c_void_p, cstruct, s32, syscall, u32, u64

IOPRIO_WHO_PROCESS = 1      # <linux/ioprio.h>; one thread in spite of its name
# <linux/sched.h>, <linux/sched/types.h>
SCHED_FLAG_UTIL_CLAMP_MIN, SCHED_FLAG_UTIL_CLAMP_MAX = 0x20, 0x40
SCHED_CAPACITY, SCHED_ATTR_SIZE_VER0 = 1024, 48


@cstruct(size=56)
class sched_attr(ctypes.Structure):
    """<linux/sched/types.h>; the last two fields since 5.3"""
    size: u32
    sched_policy: u32
    sched_flags: u64
    sched_nice: s32
    sched_priority: u32
    sched_runtime: u64
    sched_deadline: u64
    sched_period: u64
    sched_util_min: u32
    sched_util_max: u32


@syscall(NR['sched_getattr'])
def _sched_getattr(pid: c_int, attr: c_void_p, size: c_uint, flags: c_uint = 0) -> c_int: ...


@syscall(NR['ioprio_get'])
def _ioprio_get(which: c_int, who: c_int) -> c_int: ...


@syscall(NR['sched_setattr'])
def _sched_setattr(pid: c_int, attr: c_void_p, flags: c_uint = 0) -> c_int: ...


@syscall(NR['ioprio_set'])
def _ioprio_set(which: c_int, who: c_int, ioprio: c_int) -> c_int: ...


class SchedAttr(NamedTuple):
    """Scheduling attributes of a thread."""
    policy: int      # os.SCHED_*
    flags: int       # SCHED_FLAG_*
    nice: int        # -20 to 19
    priority: int
    runtime: int     # nanoseconds
    deadline: int    # nanoseconds
    period: int      # nanoseconds
    util_min: int    # utilisation clamp, of 1024; all ones if none was set, 0 on kernels without clamps
    util_max: int    # likewise


def sched_getattr(tid: int) -> SchedAttr:
    """Read the attributes of one thread, 0 for the caller. ProcessLookupError when it is gone."""
    attr = sched_attr()
    _sched_getattr(tid, ctypes.byref(attr), ctypes.sizeof(attr))
    return SchedAttr(attr.sched_policy, attr.sched_flags, attr.sched_nice, attr.sched_priority, attr.sched_runtime,
                     attr.sched_deadline, attr.sched_period, attr.sched_util_min, attr.sched_util_max)


def ioprio_get(tid: int) -> int:
    """Read I/O class << 13 | level of one thread, 0 for the caller."""
    return _ioprio_get(IOPRIO_WHO_PROCESS, tid)


def sched_setattr(tid: int, to: SchedAttr) -> None:
    """Set attributes as sched_getattr returns them. PermissionError: a better priority without CAP_SYS_NICE."""
    size, flags = ctypes.sizeof(sched_attr), to.flags
    for value, flag in ((to.util_min, SCHED_FLAG_UTIL_CLAMP_MIN), (to.util_max, SCHED_FLAG_UTIL_CLAMP_MAX)):
        # clamps that were never set are not set: kernels without clamps reject the flags
        flags |= flag if 0 < value <= SCHED_CAPACITY else 0
    if not flags & (SCHED_FLAG_UTIL_CLAMP_MIN | SCHED_FLAG_UTIL_CLAMP_MAX):
        size = SCHED_ATTR_SIZE_VER0
    attr = sched_attr(size, to.policy, flags, to.nice, to.priority, to.runtime, to.deadline, to.period, to.util_min,
                      to.util_max)
    _sched_setattr(tid, ctypes.byref(attr))


def ioprio_set(tid: int, ioprio: int) -> None:
    """Set I/O class << 13 | level of one thread."""
    _ioprio_set(IOPRIO_WHO_PROCESS, tid, ioprio)


def read_autogroup_nice(pid: int) -> int:
    """Read the nice value of the autogroup of a process (sched(7)); 0 without CONFIG_SCHED_AUTOGROUP."""
    try:
        text = Path(f'/proc/{pid}/autogroup').read_text()
    except FileNotFoundError:
        return 0
    return int(text.rpartition(' ')[2] or 0)        # '/autogroup-31 nice 5'


def write_autogroup_nice(pid: int, nice: int) -> None:
    """Set the nice value of the autogroup of a process. OSError: EPERM, EAGAIN (twice in a tenth of a second without
    CAP_SYS_ADMIN)."""
    with open(f'/proc/{pid}/autogroup', 'rb+', buffering=0) as file:  # noqa: PTH123
        file.write(str(nice).encode())

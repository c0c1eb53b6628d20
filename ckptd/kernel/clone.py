# SPDX-License-Identifier: LGPL-2.1-or-later
"""clone3(2): flags, pid and cgroup of a new task. A remote call executes it, so this module only packs bytes."""

import ctypes

from ckptd.kernel.decl import cstruct, u64

# <linux/sched.h>
CLONE_NEWTIME = 0x80
CLONE_VM = 0x100
CLONE_FS = 0x200
CLONE_FILES = 0x400
CLONE_SIGHAND = 0x800
CLONE_PARENT = 0x8000
CLONE_THREAD = 0x10000
CLONE_NEWNS = 0x20000
CLONE_SYSVSEM = 0x40000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_INTO_CGROUP = 0x200000000


@cstruct(size=88)
class clone_args(ctypes.Structure):
    """<linux/sched.h>; cgroup since 5.7"""
    flags: u64
    pidfd: u64
    child_tid: u64
    parent_tid: u64
    exit_signal: u64
    stack: u64
    stack_size: u64
    tls: u64
    set_tid: u64
    set_tid_size: u64
    cgroup: u64

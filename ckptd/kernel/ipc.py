# SPDX-License-Identifier: LGPL-2.1-or-later
"""Declarations for System V objects of all types (sysvipc(7))."""

import ctypes

from ckptd.kernel.decl import c_ulong, cstruct, s32, u16, u32

IPC_RMID, IPC_SET, IPC_STAT = 0, 1, 2       # <linux/ipc.h>
IPC_CREAT, IPC_EXCL, IPC_NOWAIT = 0o1000, 0o2000, 0o4000


@cstruct(size=48)
class ipc_perm(ctypes.Structure):
    """struct ipc64_perm of <asm-generic/ipcbuf.h>"""
    key: s32
    uid: u32
    gid: u32
    cuid: u32
    cgid: u32
    mode: u32
    seq: u16
    pad2: u16
    unused1: c_ulong
    unused2: c_ulong


def choose_next_id(kind: str, number: int) -> None:
    """Let the next object of this type have an id, if that is free (proc_sys_kernel(5)). kind: 'sem', 'msg' or 'shm'.
    OSError: EPERM without CAP_CHECKPOINT_RESTORE."""
    with open(f'/proc/sys/kernel/{kind}_next_id', 'wb', buffering=0) as file:  # noqa: PTH123
        file.write(str(number).encode())

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file system of a file (statfs(2)). It distinguishes a file of tmpfs from a secret or a message queue."""

import ctypes
from typing import Annotated

from ckptd.kernel.decl import c_int, c_long, c_void_p, cstruct, libc

# <linux/magic.h>; MQUEUE_MAGIC of ipc/mqueue.c
ANON_INODE_FS_MAGIC = 0x09041934
BINFMTFS_MAGIC = 0x42494E4D
BPF_FS_MAGIC = 0xCAFE4A11
CGROUP2_SUPER_MAGIC = 0x63677270
CGROUP_SUPER_MAGIC = 0x27E0EB
DEBUGFS_MAGIC = 0x64626720
DEVPTS_SUPER_MAGIC = 0x1CD1
EFIVARFS_MAGIC = 0xDE5E81E4
HUGETLBFS_MAGIC = 0x958458F6
MQUEUE_MAGIC = 0x19800202
NSFS_MAGIC = 0x6E736673
PID_FS_MAGIC = 0x50494446
PIPEFS_MAGIC = 0x50495045
PROC_SUPER_MAGIC = 0x9FA0
SECRETMEM_MAGIC = 0x5345434D
SECURITYFS_MAGIC = 0x73636673
SOCKFS_MAGIC = 0x534F434B
SYSFS_MAGIC = 0x62656572
TMPFS_MAGIC = 0x01021994
TRACEFS_MAGIC = 0x74726163

# file systems whose files are generated when they are read
MADE_UP = frozenset({BINFMTFS_MAGIC, BPF_FS_MAGIC, CGROUP2_SUPER_MAGIC, CGROUP_SUPER_MAGIC, DEBUGFS_MAGIC,
                     EFIVARFS_MAGIC, PROC_SUPER_MAGIC, SECURITYFS_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC})


@cstruct(size=120)
class statfs_buf(ctypes.Structure):
    """struct statfs of <asm-generic/statfs.h>, 64-bit; only the type is read."""
    f_type: c_long
    rest: Annotated[object, ctypes.c_long * 14]


@libc
def statfs(path: c_void_p, buf: c_void_p) -> c_int: ...


def file_system(path: str) -> int:
    """Return the magic number of the file system of `path`. /proc/PID/fd/N is followed to the open file itself."""
    buf = statfs_buf()
    statfs(path.encode('utf-8', 'surrogateescape'), ctypes.byref(buf))
    return buf.f_type & 0xFFFFFFFF

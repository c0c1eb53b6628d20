# SPDX-License-Identifier: LGPL-2.1-or-later
"""A System V segment (shmget(2), shmat(2))."""

import os
from dataclasses import replace

from ckptd.errors import Finding
from ckptd.image import records
from ckptd.image.records import SYSV
from ckptd.kernel.maps import Mapping
from ckptd.kernel.shm import shmctl_stat
from ckptd.kernel.shmem import SYSV_PREFIX
from ckptd.objects.files.base import finding
from ckptd.objects.mappings.base import RELEASE, SharedObject
from ckptd.objects.mappings.shared_memory import SharedMemoryKind


class SystemVMapping(SharedMemoryKind, object_kind=SYSV, prefixes=[SYSV_PREFIX]):
    """A segment, or a part of one."""

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Refuse a segment of another IPC namespace. shmctl(2) uses the caller's namespace, where the same id is
        another segment or none."""
        if os.path.samefile(f'/proc/{tid}/ns/ipc', '/proc/self/ns/ipc'):  # noqa: PTH121
            return None
        return finding('EOPNOTSUPP', 'a System V segment of another IPC namespace than that of ckptd', RELEASE)

    def complete(self, record: records.SharedMemory, shared: SharedObject, fd: int) -> records.SharedMemory:
        ipc = shmctl_stat(shared.inode)     # /proc/PID/maps shows the shmid as the inode
        return replace(record, key=ipc.key, mode=ipc.mode, uid=ipc.uid, gid=ipc.gid, size=ipc.size,
                       shmid=shared.inode)

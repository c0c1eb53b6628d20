# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory of a memfd. objects/files/memfd.py has its open files."""

import fcntl
from dataclasses import replace

from ckptd.image import records
from ckptd.image.records import MEMFD
from ckptd.kernel.shmem import MEMFD_PREFIX
from ckptd.objects.mappings.base import SharedObject
from ckptd.objects.mappings.shared_memory import SharedMemoryKind


class MemfdMapping(SharedMemoryKind, object_kind=MEMFD, prefixes=[MEMFD_PREFIX]):
    """A memfd that is mapped, or only open."""

    def name_of(self, path: str) -> str:
        return path.removeprefix(MEMFD_PREFIX)

    def complete(self, record: records.SharedMemory, shared: SharedObject, fd: int) -> records.SharedMemory:
        # F_GET_SEALS applies to the inode, so any fd of it will do
        return replace(record, seals=fcntl.fcntl(fd, fcntl.F_GET_SEALS)) if fd >= 0 else record

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The memory of a memfd. objects/files/memfd.py has its open files."""

import fcntl
from dataclasses import replace

from ckptd.image import records
from ckptd.image.records import MEMFD
from ckptd.kernel.memfd import make_memfd
from ckptd.kernel.shmem import MEMFD_PREFIX
from ckptd.objects.files.content import set_owner
from ckptd.objects.mappings.base import MappingMeans, SharedObject
from ckptd.objects.mappings.shared_memory import NamelessFileKind
from ckptd.objects.support import Support


class MemfdMapping(NamelessFileKind, object_kind=MEMFD, prefixes=[MEMFD_PREFIX]):
    """A memfd that is mapped, or only open."""
    support = Support('mapped memfds')

    def name_of(self, path: str) -> str:
        return path.removeprefix(MEMFD_PREFIX)

    def complete(self, record: records.SharedMemory, shared: SharedObject, fd: int) -> records.SharedMemory:
        # F_GET_SEALS applies to the inode, so any fd of it will do
        return replace(record, seals=fcntl.fcntl(fd, fcntl.F_GET_SEALS)) if fd >= 0 else record

    def make_empty(self, record: records.SharedMemory, means: MappingMeans) -> int:
        with means.files.as_user():
            return make_memfd(record.name, record.mode, record.seals, record.huge)

    def set_owner(self, fd: int, record: records.SharedMemory, means: MappingMeans) -> None:
        set_owner(fd, record.mode, record.uid, record.gid, means.files)

    def seal(self, means: MappingMeans) -> None:
        """Set the seals (F_ADD_SEALS) when everything is mapped: a sealed memfd cannot be mapped as before."""
        for record in means.reader.every(records.SharedMemory):
            # a memfd made without MFD_ALLOW_SEALING has only F_SEAL_SEAL
            if record.kind == MEMFD and record.seals:
                fcntl.fcntl(self.fd(record.shm_id, means, writable=True), fcntl.F_ADD_SEALS, record.seals)

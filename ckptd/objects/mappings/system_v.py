# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attached System V segment (shmat(2))."""

import os

from ckptd.errors import Finding
from ckptd.image.records import SYSV
from ckptd.kernel.maps import Mapping
from ckptd.kernel.shmem import SYSV_PREFIX
from ckptd.objects.files.base import finding
from ckptd.objects.mappings.base import RELEASE
from ckptd.objects.mappings.shared_memory import SharedMemoryKind


class SystemVMapping(SharedMemoryKind, object_kind=SYSV, prefixes=[SYSV_PREFIX]):
    """A segment, or a part of one."""

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Refuse a segment of another IPC namespace. shmctl(2) uses the caller's namespace, where the same id is
        another segment or none."""
        if os.path.samefile(f'/proc/{tid}/ns/ipc', '/proc/self/ns/ipc'):  # noqa: PTH121
            return None
        return finding('EOPNOTSUPP', 'a System V segment of another IPC namespace than that of ckptd', RELEASE)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mapped memfd. objects/files/memfd.py has its open files."""

from ckptd.image.records import MEMFD
from ckptd.kernel.shmem import MEMFD_PREFIX
from ckptd.objects.mappings.shared_memory import SharedMemoryKind


class MemfdMapping(SharedMemoryKind, object_kind=MEMFD, prefixes=[MEMFD_PREFIX]):
    """The memory of a memfd."""

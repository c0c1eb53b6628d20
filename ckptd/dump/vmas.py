# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory mappings as records: their kinds, and the files and shared objects behind them."""

import os
import stat
from dataclasses import dataclass, field
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, MAP_SHARED

from ckptd.image import records
from ckptd.image.records import (
    ANON,
    FILE_PRIVATE,
    FILE_SHARED,
    HEAP,
    MEMFD,
    SHARED_MEMORY,
    SHMEM,
    STACK,
    SYSV,
    VDSO,
    VSYSCALL,
    VVAR,
)
from ckptd.kernel.maps import DELETED, Mapping, map_file, stat_mapped
from ckptd.kernel.mman import MAP_DROPPABLE
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.shmem import shm_device

# MAP_* of <linux/mman.h>
_MAP_BY_VM_FLAG = {'gd': 0x100, 'lo': 0x2000, 'nr': 0x4000, 'ht': 0x40000, 'sf': 0x80000}
_ANON_PREFIX, _SHARED_ANON_PREFIX = '[anon:', '[anon_shmem:'

_SPECIAL = {'[vdso]': VDSO, '[vvar]': VVAR, '[vvar_vclock]': VVAR, '[vsyscall]': VSYSCALL, '[heap]': HEAP,
            '[stack]': STACK}
# Bytes; the content of a file that is mapped for writing is kept up to this size although it has a name. One example is
# Java's statistics, /tmp/hsperfdata_USER/PID: once their process is dead, the next java or a boot removes them.
KEPT_SIZE = 1 << 20
# names that the kernel shows for shared objects without a name in the file system (mm/shmem.c and ipc/shm.c)
_SHARED_OBJECTS = {'/memfd:': MEMFD, '/SYSV': SYSV, '/dev/zero (deleted)': SHMEM, '[anon_shmem:': SHMEM}


def shared_kind(path: str) -> int:
    """Return SHMEM, MEMFD or SYSV for the path of a mapping (or of an open file); 0 for anything else."""
    return next((kind for prefix, kind in _SHARED_OBJECTS.items() if path.startswith(prefix)), 0)


def map_flags(mapping: Mapping) -> int:
    """Return MAP_* that map it again. MAP_DROPPABLE (<linux/mman.h>, since 6.11) replaces MAP_PRIVATE, so memory that
    the kernel may drop at any time is not private here, and its pages are not written."""
    flags = MAP_SHARED if mapping.shared else MAP_DROPPABLE if 'dp' in mapping.vm_flags else MAP_PRIVATE
    if mapping.anonymous:
        flags |= MAP_ANONYMOUS
    for code, bit in _MAP_BY_VM_FLAG.items():
        if code in mapping.vm_flags:
            flags |= bit
    return flags


@dataclass(frozen=True, slots=True)
class View:
    """A mapping of a shared object by process `tid`."""
    tid: int
    mapping: Mapping


@dataclass(slots=True)
class Shared:
    """A shared object and the mappings through which it can be read."""
    shm_id: int
    kind: int
    path: str
    inode: int
    views: list[View] = field(default_factory=list)
    fd: int = -1

    @property
    def name(self) -> str:
        """Name that was given to memfd_create(2) or PR_SET_VMA_ANON_NAME."""
        for prefix in ('/memfd:', _SHARED_ANON_PREFIX):
            if self.path.startswith(prefix):
                return self.path.removeprefix(prefix).removesuffix(']')
        return ''

    @property
    def extent(self) -> int:
        """Bytes of the object that mappings cover, from its start."""
        return max((view.mapping.offset + view.mapping.size for view in self.views), default=0)


class MappingObjects:
    """Backings (mapped files) and shared objects of a tree, each once."""

    def __init__(self) -> None:
        self.backings: list[records.Backing] = []
        self.kept: dict[int, View] = {}     # files whose content is kept: index into backings, a view to read it by
        self.shared: dict[tuple[int, int, int], Shared] = {}
        self._backing_ids: dict[tuple[int, int, int, str], int] = {}

    def backing(self, view: View) -> int:
        """Return the id of the file behind a mapping."""
        mapping = view.mapping
        key = (mapping.major, mapping.minor, mapping.inode, mapping.path)
        if key not in self._backing_ids:
            record = self._describe(view)
            self._backing_ids[key] = record.backing_id
            self.backings.append(record)
        index = self._backing_ids[key] - 1
        if _goes_along(self.backings[index], mapping):
            self.kept.setdefault(index, view)
        return self._backing_ids[key]

    def _describe(self, view: View) -> records.Backing:
        mapping, number = view.mapping, len(self.backings) + 1
        mapped = stat_mapped(view.tid, mapping) if mapping.size else os.stat(mapped_path(view))  # noqa: PTH116
        # a name may itself end in " (deleted)": only the inode is certain
        for path in (mapping.path, mapping.file_path):
            named = lstat_of_task(view.tid, path)
            if named is not None and (os.path.samestat(named, mapped) if mapped else named.st_ino == mapping.inode):
                return _backing(number, path, named)
        if mapped is None and not mapping.deleted:
            # we can neither see nor open it, so use the kernel's numbers, by which a restart identifies it
            device = os.makedev(mapping.major, mapping.minor)
            return records.Backing(number, mapping.path, device, mapping.inode, 0, 0, 0, 0, ())
        return records.Backing(number, mapping.file_path, 0, mapping.inode, 0, 0, 0, 1, ())

    def executable(self, tid: int) -> int:
        """Return the backing id of /proc/TID/exe. The link opens the file itself, so a deleted one is found, too."""
        exe = f'/proc/{tid}/exe'
        path, at = os.readlink(exe), os.stat(exe)  # noqa: PTH115, PTH116
        mapping = Mapping(0, 0, True, False, True, False, 0, os.major(at.st_dev), os.minor(at.st_dev), at.st_ino, path)
        return self.backing(View(tid, mapping))

    def share(self, view: View, kind: int) -> int:
        """Return the id of the shared object behind a mapping."""
        mapping = view.mapping
        key = (mapping.major, mapping.minor, mapping.inode)
        if key not in self.shared:
            path = mapping.path.removesuffix(DELETED)
            self.shared[key] = Shared(len(self.shared) + 1, kind, path, mapping.inode)
        self.shared[key].views.append(view)
        return self.shared[key].shm_id

    def share_file(self, at: os.stat_result, path: str, open_path: str) -> int:
        """Return the id of the memfd behind an open file, mapped or not. It is opened anew, because SEEK_DATA moves a
        file position."""
        key = (os.major(at.st_dev), os.minor(at.st_dev), at.st_ino)
        shared = self.shared.setdefault(key, Shared(len(self.shared) + 1, MEMFD, path.removesuffix(DELETED), at.st_ino))
        if shared.fd < 0:
            shared.fd = os.open(open_path, os.O_RDONLY | os.O_CLOEXEC)
        return shared.shm_id

    def close(self) -> None:
        for shared in self.shared.values():
            if shared.fd >= 0:
                os.close(shared.fd)
                shared.fd = -1


def _goes_along(backing: records.Backing, mapping: Mapping) -> bool:
    """Whether to keep the content: of a deleted file, or a small one that is written through the mapping, since it may
    not exist later."""
    written = mapping.shared and mapping.write and stat.S_ISREG(backing.mode) and backing.size <= KEPT_SIZE
    return bool(backing.deleted) or written


def _backing(number: int, path: str, at: os.stat_result) -> records.Backing:
    # st_dev and not the numbers in maps: on btrfs and overlayfs they differ, and a restart compares with stat(2)
    return records.Backing(number, path, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_mode, 0, ())


def mapped_path(view: View) -> str:
    """Return a magic link to the mapped file, deleted or not; for a View without addresses, to the task's program."""
    return map_file(view.tid, view.mapping) if view.mapping.size else f'/proc/{view.tid}/exe'


def vma_record(mm_id: int, tid: int, mapping: Mapping, objects: MappingObjects) -> records.Vma:
    """Make the record of one mapping. Its file or shared object is added to `objects`."""
    kind, number = _classify(View(tid, mapping), objects)
    protection = mapping.read | mapping.write << 1 | mapping.execute << 2
    locked = 2 if 'lf' in mapping.vm_flags else int('lo' in mapping.vm_flags)
    return records.Vma(mm_id, mapping.start, mapping.end, protection, map_flags(mapping), kind, mapping.offset, number,
                       locked, ' '.join(sorted(mapping.vm_flags)), _name(mapping), mapping.pkey)


def _classify(view: View, objects: MappingObjects) -> tuple[int, int]:
    mapping = view.mapping
    if mapping.path in _SPECIAL:
        return _SPECIAL[mapping.path], 0
    if mapping.anonymous:
        return (STACK if 'gd' in mapping.vm_flags else ANON), 0
    kind = shared_kind(mapping.path)
    # a file may have such a name, too
    if kind and os.makedev(mapping.major, mapping.minor) == shm_device():
        return SHARED_MEMORY, objects.share(view, kind)
    return (FILE_SHARED if mapping.shared else FILE_PRIVATE), objects.backing(view)


def _name(mapping: Mapping) -> str:
    """Return the name that prctl(PR_SET_VMA) set, or the one in maps."""
    for prefix in (_ANON_PREFIX, _SHARED_ANON_PREFIX):
        if mapping.path.startswith(prefix):
            return mapping.path.removeprefix(prefix).removesuffix(']')
    return mapping.path

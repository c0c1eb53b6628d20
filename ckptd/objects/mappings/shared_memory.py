# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared memory without a name in the file system: the object behind a shared anonymous mapping, and its relatives."""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from ckptd.image import records
from ckptd.image.records import SHARED_MEMORY, SHMEM, PageRun
from ckptd.kernel.maps import DELETED, Mapping
from ckptd.kernel.memory import Mem
from ckptd.kernel.shmem import NAMED_ANONYMOUS, SHARED_ANONYMOUS, is_of_shm_mount
from ckptd.objects.mappings.base import MappingKind, PageCopier, SharedObject, View


class SharedMemoryKind(MappingKind, numbers=[SHARED_MEMORY]):
    """A kind of shared object, with the hooks of its object:

        share_file(at, path, open_path)     note an object that is open, mapped or not
        copy_object(shared, copier)         its record and its content
        complete(record, shared, fd)        the fields that only this kind has

    object_kind: SharedMemory.kind in images. prefixes: of its paths in /proc.
    """
    object_kind: ClassVar[int]
    prefixes: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, object_kind: int, prefixes: Collection[str], **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.object_kind, cls.prefixes = object_kind, tuple(prefixes)

    def matches(self, mapping: Mapping) -> bool:
        # a file may have such a name, too
        return mapping.path.startswith(self.prefixes) and is_of_shm_mount(mapping)

    def object_of(self, view: View) -> tuple[int, int]:
        mapping = view.mapping
        shared = self._shared((mapping.major, mapping.minor, mapping.inode), mapping.path)
        shared.views.append(view)
        return SHARED_MEMORY, shared.shm_id

    def share_file(self, at: os.stat_result, path: str, open_path: str) -> int:
        """Return the shm_id of an open file. It is opened anew, because SEEK_DATA moves a file position."""
        shared = self._shared((os.major(at.st_dev), os.minor(at.st_dev), at.st_ino), path)
        if shared.fd < 0:
            shared.fd = os.open(open_path, os.O_RDONLY | os.O_CLOEXEC)
        return shared.shm_id

    def _shared(self, key: tuple[int, int, int], path: str) -> SharedObject:
        known = self._tables.shared
        if key not in known:
            known[key] = SharedObject(len(known) + 1, self, path.removesuffix(DELETED), key[2])
        return known[key]

    def copy_object(self, shared: SharedObject, copier: PageCopier) -> tuple[records.SharedMemory, list[PageRun]]:
        with _opened(shared) as fd:
            if fd >= 0:
                at = os.fstat(fd)
                size, mode, uid, gid = at.st_size, at.st_mode, at.st_uid, at.st_gid
                runs = copier.copy_file(fd, size)
            else:
                # An ordinary user may not open it (CAP_CHECKPOINT_RESTORE), and dumps only objects that belong to that
                # user.
                size, mode, uid, gid = shared.extent, 0o600, os.geteuid(), os.getegid()
                runs = _copy_views(shared, copier)
            record = records.SharedMemory(shared.shm_id, self.object_kind, size, self.name_of(shared.path), 0, mode,
                                          uid, gid, 0, 0)
            return self.complete(record, shared, fd), runs

    def name_of(self, path: str) -> str:
        """Return the name that the program gave the object."""
        return ''

    def complete(self, record: records.SharedMemory, shared: SharedObject, fd: int) -> records.SharedMemory:
        """Add what only this kind has. fd: of the object, or -1."""
        return record


class SharedAnonymousMapping(SharedMemoryKind, object_kind=SHMEM, prefixes=SHARED_ANONYMOUS):
    """Memory of mmap(2) with MAP_SHARED and MAP_ANONYMOUS."""

    def name_of(self, path: str) -> str:
        """Return the name of PR_SET_VMA_ANON_NAME."""
        return path.removeprefix(NAMED_ANONYMOUS).removesuffix(']') if path.startswith(NAMED_ANONYMOUS) else ''


@contextmanager
def _opened(shared: SharedObject) -> Iterator[int]:
    """Open the object behind a mapping; -1 without CAP_CHECKPOINT_RESTORE, which proc_pid_map_files(5) requires."""
    if shared.fd >= 0:
        yield shared.fd
        return
    fd = _open_any(shared.views)
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def _open_any(views: Sequence[View]) -> int:
    for view in views:
        try:
            return os.open(view.magic_link, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            continue
    return -1


def _copy_views(shared: SharedObject, copier: PageCopier) -> list[PageRun]:
    """Copy through the mappings: everything that they cover, each part once. Unmapped pages cannot be read."""
    runs: list[PageRun] = []
    done = 0
    for view in sorted(shared.views, key=lambda view: view.mapping.offset):
        start, end = max(view.mapping.offset, done), view.mapping.offset + view.mapping.size
        if start < end:
            base = view.mapping.start - view.mapping.offset
            with Mem(view.tid) as mem:
                runs += copier.copy_memory(mem, [(base + start, base + end)], base=base)
            done = end
    return runs

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shared memory without a name in the file system: the object behind a shared anonymous mapping, and its relatives."""

import ctypes
import mmap
import os
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from ckptd.image import records
from ckptd.image.reader import ImageReader
from ckptd.image.records import PAGE, SHARED_MEMORY, SHMEM, PageRun
from ckptd.kernel.hugetlb import hugetlb_devices, written_pages
from ckptd.kernel.maps import DELETED, Mapping
from ckptd.kernel.memfd import make_memfd
from ckptd.kernel.memory import Mem
from ckptd.kernel.mman import MAP_HUGETLB, MAP_NORESERVE, huge_page_flags
from ckptd.kernel.shmem import ANONYMOUS_HUGE, NAMED_ANONYMOUS, SHARED_ANONYMOUS, is_of_shm_mount
from ckptd.objects.mappings.base import MappingKind, MappingMeans, PageCopier, SharedObject, View
from ckptd.objects.support import Support


class SharedMemoryKind(MappingKind, numbers=[SHARED_MEMORY]):
    """A kind of shared object, with the hooks of its object:

        share_file(at, path, open_path)     notes an object that is open, mapped or not
        copy_object(shared, copier)         its record and its content
        complete(record, shared, fd)        adds the fields that only this kind has

    object_kind: SharedMemory.kind in images. prefixes: of its paths in /proc.
    """
    object_kind: ClassVar[int]
    prefixes: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, object_kind: int = 0, prefixes: Collection[str] = (), **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.object_kind, cls.prefixes = object_kind, tuple(prefixes)

    def matches(self, mapping: Mapping) -> bool:
        # a file may have such a name, too
        return mapping.path.startswith(self.prefixes) and is_of_shm_mount(mapping)

    def object_of(self, view: View) -> tuple[int, int]:
        mapping = view.mapping
        shared = self._shared((mapping.major, mapping.minor, mapping.inode), mapping.path)
        shared.views.append(view)
        shared.huge = mapping.huge
        return SHARED_MEMORY, shared.shm_id

    def share_file(self, at: os.stat_result, path: str, open_path: str) -> int:
        """Return the shm_id of an open file. It is opened anew, because SEEK_DATA moves a file position."""
        shared = self._shared((os.major(at.st_dev), os.minor(at.st_dev), at.st_ino), path)
        if shared.fd < 0:
            shared.fd = os.open(open_path, os.O_RDONLY | os.O_CLOEXEC)
            shared.huge = at.st_blksize if at.st_dev in hugetlb_devices() else 0
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
                runs = copier.copy_file(fd, size, written_pages(fd, size, shared.huge) if shared.huge else None)
            else:
                # An ordinary user may not open it (CAP_CHECKPOINT_RESTORE), and dumps only objects that belong to that
                # user.
                size, mode, uid, gid = shared.extent, 0o600, os.geteuid(), os.getegid()
                runs = _copy_views(shared, copier)
            record = records.SharedMemory(shared.shm_id, self.object_kind, size, self.name_of(shared.path), 0, mode,
                                          uid, gid, 0, 0, shared.huge)
            return self.complete(record, shared, fd), runs

    def name_of(self, path: str) -> str:
        """Return the name that the program gave the object."""
        return ''

    def complete(self, record: records.SharedMemory, shared: SharedObject, fd: int) -> records.SharedMemory:
        """Add what only this kind has. fd: of the object, or -1."""
        return record


class NamelessFileKind(SharedMemoryKind):
    """A kind of shared object that is opened as a file, with further hooks:

        make_empty(record, means)           makes it again
        set_owner(fd, record, means)        when it has its content
    """

    def fd(self, number: int, means: MappingMeans, *, writable: bool) -> int:
        """Return the fd of a shared object with its content."""
        files, record = means.files, means.reader.get(records.SharedMemory, number)
        fd = files.once(('shared', number), lambda: self._make(record, means))
        if writable:
            return fd
        return files.once(('shared', number, 'r'), lambda: os.open(f'/proc/self/fd/{fd}', os.O_RDONLY))

    def _make(self, record: records.SharedMemory, means: MappingMeans) -> int:
        runs = means.reader.shared_runs(record.shm_id)
        fd = self.make_empty(record, means)
        try:
            whole = whole_size(record)
            if os.fstat(fd).st_size != whole:
                os.ftruncate(fd, whole)
            _fill(fd, runs, whole, means.reader)
            if whole != record.size and not record.huge:
                os.ftruncate(fd, record.size)
            self.set_owner(fd, record, means)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @abstractmethod
    def make_empty(self, record: records.SharedMemory, means: MappingMeans) -> int:
        """Make an empty object that belongs to the user."""

    @abstractmethod
    def set_owner(self, fd: int, record: records.SharedMemory, means: MappingMeans) -> None: ...


class SharedAnonymousMapping(NamelessFileKind, object_kind=SHMEM, prefixes=SHARED_ANONYMOUS):
    """Memory of mmap(2) with MAP_SHARED and MAP_ANONYMOUS, perhaps also MAP_HUGETLB."""
    support = Support('shared anonymous memory', user='it is shown as a memfd')
    takes_name = True

    def matches(self, mapping: Mapping) -> bool:
        return super().matches(mapping) and (mapping.shared or mapping.path != ANONYMOUS_HUGE)

    def name_of(self, path: str) -> str:
        """Return the name of PR_SET_VMA_ANON_NAME."""
        return path.removeprefix(NAMED_ANONYMOUS).removesuffix(']') if path.startswith(NAMED_ANONYMOUS) else ''

    def make_empty(self, record: records.SharedMemory, means: MappingMeans) -> int:
        """Open the object behind a new shared anonymous mapping. Without the right to open it (CAP_CHECKPOINT_RESTORE
        in the first user namespace, proc_pid_map_files(5)), make a memfd, which differs in name only."""
        length = whole_size(record) or record.huge or PAGE
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
        if record.huge:
            flags |= MAP_HUGETLB | huge_page_flags(record.huge) | MAP_NORESERVE
        with means.files.as_user():
            object_ = mmap.mmap(-1, length, flags)
        with object_ as memory:
            hold = ctypes.c_char.from_buffer(memory)
            at = ctypes.addressof(hold)
            try:
                return os.open(f'/proc/self/map_files/{at:x}-{at + length:x}', os.O_RDWR | os.O_CLOEXEC)
            except PermissionError:
                with means.files.as_user():
                    return make_memfd('shared', 0o777, 0, record.huge)
            finally:
                del hold

    def set_owner(self, fd: int, record: records.SharedMemory, means: MappingMeans) -> None:
        with means.files.as_user():
            if os.fstat(fd).st_mode & 0o7777 != record.mode & 0o7777:
                os.fchmod(fd, record.mode & 0o7777)


# ---------------------------------------------------------------- dump

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


# ---------------------------------------------------------------- restart

def whole_size(record: records.SharedMemory) -> int:
    """Return the bytes of an object in whole pages."""
    return rounded_up(record.size, record.huge or PAGE)


def rounded_up(size: int, page: int) -> int:
    return -(-size // page) * page


def _fill(fd: int, runs: Iterable[PageRun], size: int, reader: ImageReader) -> None:
    """Fill the object inside the kernel: pages go from the image's page cache into the object's."""
    if not size:
        return
    # of huge pages only those are taken that are filled
    with mmap.mmap(fd, size, mmap.MAP_SHARED | MAP_NORESERVE) as memory, memoryview(memory) as view:
        for run in runs:
            reader.pread_into(view[run.start:run.start + run.pages * PAGE], run.part, run.offset)

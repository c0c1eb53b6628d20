# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mapped objects of address spaces: files by their paths; deleted files and shared memory made again with their
content."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable
from typing import Protocol

from ckptd.errors import Busy, CkptError, PermissionDenied
from ckptd.image.reader import ImageReader
from ckptd.image.records import MEMFD, PAGE, SYSV, Backing, PageRun, SharedMemory, Vma
from ckptd.journal.steps import MakeSegment
from ckptd.kernel.memfd import make_memfd
from ckptd.kernel.shm import SHM_DEST, ShmidDs, attached, shmctl_remove, shmctl_set, shmctl_stat, shmget_at
from ckptd.objects.files.base import ByUser, FileLookup
from ckptd.objects.files.content import set_owner
from ckptd.objects.files.deleted import open_nameless
from ckptd.restore.service_fds import ServiceFds


def missing_but_kept(record: Backing, lookup: FileLookup) -> bool:
    """Whether a mapped file that had a name is gone, while its content is in the image. It is then made again without a
    name. A file of that name that belongs to another process, as with Java's statistics, is left alone."""
    if record.deleted or not record.content:
        return False
    found = lookup.lstat(record.path)
    return found is None or (found.st_ino != record.inode and lookup.changed_files != 'accept')


class TakeOver(FileLookup, ByUser, Protocol):
    """The rights that decide about a System V segment that still exists."""

    def may_take(self, found: ShmidDs) -> bool:
        """Whether its content may be replaced by that of the image."""
        ...

    def open_linked(self, link: str, path: str, flags: int) -> int:
        """Open a linked file, see objects.files.restoring.RestoreContext.open_linked."""
        ...

    def owns(self, found: ShmidDs) -> bool:
        """Whether its owner and mode may be set again."""
        ...


class MappedObjects:
    """Objects that are made on first use, as service fds. deleted: makes a file without a name. note: writes down a
    step for an object that would outlive a failure."""

    def __init__(self, reader: ImageReader, service_fds: ServiceFds, lookup: TakeOver,
                 deleted: Callable[[Backing], int],
                 note: Callable[[MakeSegment], None]) -> None:
        self._reader, self._service_fds, self._lookup, self._deleted = reader, service_fds, lookup, deleted
        self._note = note
        self._prepared: set[int] = set()

    def data(self, part: int) -> int:
        """Return the fd of a data part, for preadv(2)."""
        return self._service_fds.once(('data', part), lambda: os.dup(self._reader.data_fd(part)))

    def backing(self, number: int, *, writable: bool) -> int:
        """Return the fd of a mapped file or executable."""
        record = self._reader.get(Backing, number)
        flags = os.O_RDWR if writable else os.O_RDONLY
        if record.link:
            return self._service_fds.once(('backing', number, writable), lambda: self._linked(record, flags))
        if record.deleted or missing_but_kept(record, self._lookup):
            base = self._deleted(record)
            return self._service_fds.once(('backing', number), lambda: open_nameless(base, os.O_RDWR, self._lookup)
                                          ) if writable else base
        return self._service_fds.once(('backing', number, writable), lambda: self._lookup.open(record.path, flags))

    def _linked(self, record: Backing, flags: int) -> int:
        """Open a deleted file that has another name by the name that the checkpoint gave it."""
        fd = self._lookup.open_linked(record.link, record.path, flags)
        if os.fstat(fd).st_ino != record.inode:
            os.close(fd)
            raise CkptError(f'{record.link} is another file now', errno=errno.ESTALE, resource=record.path)
        return fd

    def shared(self, number: int, *, writable: bool = True) -> int:
        """Return the fd of a shared object other than a System V segment, with its content."""
        fd = self._service_fds.once(('shared', number), lambda: self._make(self._reader.get(SharedMemory, number)))
        if writable:
            return fd
        return self._service_fds.once(('shared', number, 'r'), lambda: os.open(f'/proc/self/fd/{fd}', os.O_RDONLY))

    # ------------------------------------------------------------ shared memory

    def _make(self, record: SharedMemory) -> int:
        runs = self._reader.shared_runs(record.shm_id)
        fd = self._new(record)
        try:
            whole = -(-record.size // PAGE) * PAGE
            if os.fstat(fd).st_size != whole:
                os.ftruncate(fd, whole)
            self._fill(fd, runs, whole)
            if whole != record.size:
                os.ftruncate(fd, record.size)
            self._set_owner(fd, record)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _new(self, record: SharedMemory) -> int:
        """Make an empty object that belongs to the user."""
        if record.kind == MEMFD:
            with self._lookup.as_user():
                return make_memfd(record.name, record.mode, record.seals)
        return _anonymous(record.size, self._lookup)

    def _set_owner(self, fd: int, record: SharedMemory) -> None:
        if record.kind == MEMFD:
            set_owner(fd, record.mode, record.uid, record.gid, self._lookup)
            return
        with self._lookup.as_user():
            if os.fstat(fd).st_mode & 0o7777 != record.mode & 0o7777:
                os.fchmod(fd, record.mode & 0o7777)

    def _fill(self, fd: int, runs: Iterable[PageRun], size: int) -> None:
        """Fill the object inside the kernel: pages go from the image's page cache into the object's."""
        if not size:
            return
        with mmap.mmap(fd, size) as memory, memoryview(memory) as view:
            for run in runs:
                self._read(view[run.start:run.start + run.pages * PAGE], run.part, run.offset)

    def _read(self, view: memoryview, part: int, offset: int) -> None:
        self._reader.pread_into(view, part, offset)

    def seal(self) -> None:
        """Set the seals (F_ADD_SEALS) when everything is mapped: a sealed memfd cannot be mapped as before."""
        for record in self._reader.every(SharedMemory):
            if record.kind == MEMFD:
                seals = record.seals
                # 1 is F_SEAL_SEAL; a memfd made without MFD_ALLOW_SEALING has only that
                if seals & ~1:
                    fcntl.fcntl(self.shared(record.shm_id), fcntl.F_ADD_SEALS, seals)
                elif seals:
                    fcntl.fcntl(self.shared(record.shm_id), fcntl.F_ADD_SEALS, 1)

    # ------------------------------------------------------------ System V

    def segment(self, number: int) -> int:
        """Return the shmid of a segment, which is the same as before."""
        record = self._reader.get(SharedMemory, number)
        if number not in self._prepared:
            self._prepared.add(number)
            self._make_segment(record)
        return record.shmid

    def _make_segment(self, record: SharedMemory) -> None:
        mode = record.mode & 0o777
        found = self._adopt(record)
        if not found:
            try:
                shmget_at(record.shmid, record.key, record.size, mode)
            except OSError as error:
                raise CkptError(f'cannot make System V segment {record.shmid}: {error.strerror}', errno=error.errno,
                                resource=f'shmid {record.shmid}') from error
            self._note(MakeSegment(record.shmid, record.key, record.size, os.geteuid(), os.getegid(),
                                   tuple(os.getgroups())))
        if not found or self._lookup.owns(found):
            shmctl_set(record.shmid, record.uid, record.gid, mode)
        with attached(record.shmid, record.size) as view:
            for run in self._reader.shared_runs(record.shm_id):
                end = min(run.start + run.pages * PAGE, len(view))
                self._read(view[run.start:end], run.part, run.offset)

    def _adopt(self, record: SharedMemory) -> ShmidDs | None:
        """Take over a segment, which outlives its users: exactly the same one, if it is not in use now."""
        try:
            found = shmctl_stat(record.shmid)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EIDRM):
                return None
            raise
        if (found.key, found.size) != (record.key, record.size) or found.attached:
            raise Busy(f'System V segment {record.shmid} is in use', resource=f'shmid {record.shmid}',
                       hint='"ipcs -m -i" shows its users; "ipcrm -m" removes it')
        if not self._lookup.may_take(found):
            raise PermissionDenied(f'System V segment {record.shmid} may not be written',
                                   resource=f'shmid {record.shmid}')
        return found

    def finish(self) -> None:
        """Mark segments for destruction again that were marked, now that they are attached."""
        for record in self._reader.every(SharedMemory):
            if record.kind == SYSV and record.shm_id in self._prepared and record.mode & SHM_DEST:
                shmctl_remove(record.shmid)


def _anonymous(size: int, user: ByUser) -> int:
    """Open the object behind a new shared anonymous mapping. Without the right to open it (CAP_CHECKPOINT_RESTORE in
    the first user namespace, proc_pid_map_files(5)), make a memfd, which differs in name only."""
    length = max(-(-size // PAGE) * PAGE, PAGE)
    with user.as_user():
        object_ = mmap.mmap(-1, length)
    with object_ as memory:
        hold = ctypes.c_char.from_buffer(memory)
        at = ctypes.addressof(hold)
        try:
            return os.open(f'/proc/self/map_files/{at:x}-{at + length:x}', os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            with user.as_user():
                return make_memfd('shared', 0o777, 0)
        finally:
            del hold


def may_write(vma: Vma) -> bool:
    """Whether a shared mapping was made from a file that is open for writing."""
    return 'mw' in vma.vm_flags.split()

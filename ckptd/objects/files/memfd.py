# SPDX-License-Identifier: LGPL-2.1-or-later
"""A memfd: shared memory with an fd and a name for people (memfd_create(2))."""

import fcntl
import os
import stat

from ckptd.errors import Finding
from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.memfd import is_forbidden, make_memfd
from ckptd.kernel.shmem import MEMFD_PREFIX, on_shm_mount
from ckptd.objects.files.base import Content, FileLookup, Kind, Needs, OpenFile, RestoreContext, finding, open_again
from ckptd.objects.files.content import (
    ContentSegment,
    content_size,
    dump_content,
    owner_findings,
    restore_content,
    set_owner,
    unread_findings,
)
from ckptd.objects.files.locks import Lock, read_locks, restore_locks
from ckptd.objects.support import Support


@layout
class Memfd(Struct):
    """A memfd.

    device, inode: equal for every description and mapping of one object. shm_id: the SharedMemory record that has the
    content, 0 if it is in `content`. seals: F_SEAL_*.
    """
    name: str
    device: U64
    inode: U64
    size: U64
    mode: U32
    uid: U32
    gid: U32
    seals: U32
    shm_id: U32
    content: tuple[ContentSegment, ...]
    locks: tuple[Lock, ...]


class MemfdKind(Kind[Memfd], tag='memfd'):
    support = Support('memfds, with seals', refused='a restart without enough free huge pages')

    def matches(self, file: OpenFile) -> bool:
        return (stat.S_ISREG(file.stat.st_mode) and not file.is_path and on_shm_mount(file.stat)
                and file.link.startswith(MEMFD_PREFIX))

    def findings(self, file: OpenFile) -> list[Finding]:
        return unread_findings(file)

    def dump(self, file: OpenFile, content: Content) -> Memfd:
        of = file.stat
        shm_id = content.shared_memory(file)
        segments = () if shm_id else self._content(file, content)
        with file.duplicate() as fd:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        return Memfd(file.path.removeprefix(MEMFD_PREFIX), of.st_dev, of.st_ino, of.st_size, of.st_mode, of.st_uid,
                     of.st_gid, seals, shm_id, segments, read_locks(file))

    def _content(self, file: OpenFile, content: Content) -> tuple[ContentSegment, ...]:
        with file.reopen(os.O_RDONLY) as fd:
            return dump_content(fd, file.stat.st_size, content)

    def restart_findings(self, record: Memfd, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        rows = owner_findings(f'memfd {record.name}', record.uid, record.gid, lookup)
        if is_forbidden(record.mode, record.seals):
            rows.append(finding('EACCES', f'memfd {record.name} may be executed, and vm.memfd_noexec=2 forbids to make '
                                'such a file', 'restore it where vm.memfd_noexec is 0 or 1'))
        return rows

    def needs(self, record: Memfd, saved: SavedFile) -> Needs:
        return Needs(_key(record), memory=content_size(record.content))

    def create(self, record: Memfd, saved: SavedFile, ctx: RestoreContext) -> int:
        base, is_first = self._object(record, ctx), False
        if saved.flags & os.O_ACCMODE != os.O_RDWR:
            return open_again(base, saved.flags)

        def take() -> int:
            nonlocal is_first
            is_first = True
            return os.dup(base)
        # The kernel counts no writer for the description that memfd_create(2) returns (mm/shmem.c, __shmem_file_setup),
        # and one for each that is opened later: with such a writer the file cannot be executed (execve(2), ETXTBSY). No
        # interface shows which description that was, so use the first one that is open for reading and writing.
        original = ctx.once(('original', *_key(record)), take)
        return os.dup(original) if is_first else open_again(base, saved.flags)

    def _object(self, record: Memfd, ctx: RestoreContext) -> int:
        if record.shm_id:
            return ctx.shared_memory(record.shm_id)

        def make() -> int:
            with ctx.as_user():
                fd = make_memfd(record.name, record.mode, record.seals)
            try:
                restore_content(fd, record.size, record.content, ctx)
                set_owner(fd, record.mode, record.uid, record.gid, ctx)
            except BaseException:
                os.close(fd)
                raise
            return fd
        return ctx.once(_key(record), make)

    def connect(self, record: Memfd, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        restore_locks(record.locks, f'memfd {record.name}', saved, fd, ctx)
        # the seals of an object that address spaces have are set with its content
        if not record.shm_id and record.seals & ~fcntl.fcntl(fd, fcntl.F_GET_SEALS):
            fcntl.fcntl(self._object(record, ctx), fcntl.F_ADD_SEALS, record.seals)


def _key(record: Memfd) -> tuple[str, int, int]:
    return 'memfd', record.device, record.inode

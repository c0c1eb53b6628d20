# SPDX-License-Identifier: LGPL-2.1-or-later
"""A regular file, kept by name; one that has lost its name is kept with its content."""

import os
import re
import stat

from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.kernel import statfs
from ckptd.kernel.shmem import on_shm_mount
from ckptd.kinds.base import Content, Kind, OpenFile, Reason
from ckptd.kinds.content import Segment, dump_content
from ckptd.kinds.locks import LEASE, Lock, read_locks

# regular by their mode, and yet no files with a name and content
_NOT_FILES = {statfs.ANON_INODE_FS_MAGIC, statfs.HUGETLBFS_MAGIC, statfs.MQUEUE_MAGIC, statfs.NSFS_MAGIC,
              statfs.PID_FS_MAGIC, statfs.SECRETMEM_MAGIC}
_OF_PROCESS = re.compile(r'/proc/\d+/')


@layout
class Regular(Struct):
    """path: from the root of the mount namespace. mtime: nanoseconds. file_system: statfs(2) f_type; on one that makes
    its files up (proc, sysfs, cgroup) size and mtime say nothing. links: names that are left. content: if deleted."""
    path: str
    device: U64
    inode: U64
    size: U64
    mtime: U64
    mode: U32
    uid: U32
    gid: U32
    links: U32
    file_system: U32
    deleted: U8
    content: tuple[Segment, ...]
    locks: tuple[Lock, ...]


class RegularKind(Kind[Regular], tag='regular'):

    def matches(self, file: OpenFile) -> bool:
        return (stat.S_ISREG(file.stat.st_mode) and not file.is_path and not on_shm_mount(file.stat)
                and file.magic not in _NOT_FILES)

    def refusals(self, file: OpenFile) -> list[Reason]:
        if file.deleted:
            return self._deleted(file)
        if not file.reachable:
            return [Reason('ENOENT', f'{file.path} is another file now, or covered by a mount',
                           'a restart opens files by path: uncover the mount or put the file back', 'warning')]
        if file.magic == statfs.PROC_SUPER_MAGIC and _OF_PROCESS.match(file.path):
            return [Reason('ENOENT', f'{file.path} belongs to a process',
                           'a restart needs a process with that pid', 'warning')]
        return []

    def _deleted(self, file: OpenFile) -> list[Reason]:
        if not os.access(file.proc_path, os.R_OK, effective_ids=True):
            return [Reason('EACCES', f'{file.path} is deleted and its content cannot be read',
                           'run as root, or give the file a name (ln) before the checkpoint')]
        if any(lock.kind == LEASE for lock in read_locks(file)):
            # opening a leased file breaks the lease, fcntl(2), and a deleted file must be opened for its content
            return [Reason('EBUSY', f'{file.path} is deleted and leased', 'release the lease (F_SETLEASE, F_UNLCK)')]
        if file.stat.st_nlink:
            return [Reason('ENOENT', f'{file.path} is deleted but has another name',
                           'a restart makes a file of its own that other name does not share', 'warning')]
        return []

    def dump(self, file: OpenFile, content: Content) -> Regular:
        of = file.stat
        return Regular(file.path, of.st_dev, of.st_ino, of.st_size, max(of.st_mtime_ns, 0), of.st_mode, of.st_uid,
                       of.st_gid, of.st_nlink, file.magic, file.deleted, self._content(file, content),
                       read_locks(file))

    def _content(self, file: OpenFile, content: Content) -> tuple[Segment, ...]:
        if not file.deleted:
            return ()
        with file.reopen(os.O_RDONLY) as fd:
            return dump_content(fd, file.stat.st_size, content)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A regular file, kept by name. One that has lost its name is kept with its content."""

import errno
import os
import stat
from pathlib import PurePath

from ckptd.errors import CkptError, Finding
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.identity import MISSING, FileIdentity, changes
from ckptd.image.records import SavedFile
from ckptd.kernel import statfs
from ckptd.kernel.shmem import on_shm_mount
from ckptd.objects.files.base import (
    Content,
    FileLookup,
    Kind,
    Needs,
    OpenFile,
    RestoreContext,
    access_of,
    finding,
    of_process,
    opening,
)
from ckptd.objects.files.content import (
    ContentSegment,
    dump_content,
    open_quietly,
    owner_findings,
    restore_content,
    set_owner,
)
from ckptd.objects.files.dead_process import is_of_dead_process
from ckptd.objects.files.deleted import deleted_file, deleted_findings, deleted_takes, flag_findings, open_nameless
from ckptd.objects.files.hidden import hidden_findings
from ckptd.objects.files.linked import DeletedFile, link_findings, lost_name
from ckptd.objects.files.locks import LEASE, Lock, lock_findings, read_locks, restore_locks
from ckptd.objects.files.rollback import digest_tail, only_appended, roll_back
from ckptd.objects.support import Support

# regular by their mode, but not files with a name and content
_NOT_FILES = {statfs.ANON_INODE_FS_MAGIC, statfs.HUGETLBFS_MAGIC, statfs.MQUEUE_MAGIC, statfs.NSFS_MAGIC,
              statfs.PID_FS_MAGIC, statfs.SECRETMEM_MAGIC}
_VERBS = {os.R_OK: 'read', os.W_OK: 'written', os.R_OK | os.W_OK: 'read and written'}


@layout
class Regular(Struct):
    """path: from the root of the mount namespace. mtime: nanoseconds. file_system: statfs(2) f_type; on one that makes
    its files up (proc, sysfs, cgroup) size and mtime say nothing. links: names that are left. content: if deleted.
    link: of a deleted file that has another name, the one that the checkpoint gave it, by which it is found."""
    path: str
    device: U64
    inode: U64
    size: U64
    mtime: U64    # nanoseconds
    mode: U32
    uid: U32
    gid: U32
    links: U32                             # names that are left
    file_system: U32                       # statfs(2) f_type; on a file system that generates its files (proc, sysfs,
                                           # cgroup) size and mtime are meaningless
    deleted: U8
    content: tuple[ContentSegment, ...]    # if deleted
    locks: tuple[Lock, ...]
    is_saved: U8 = 0
    saved: tuple[ContentSegment, ...] = ()
    tail: bytes = b''
    link: str = ''

    @property
    def place(self) -> str:
        """The path that it is opened by."""
        return self.link or self.path


class RegularKind(Kind[Regular], tag='regular'):
    support = Support('regular files: position, flags, locks and leases', dumped='name',
                      refused='a file that has changed since, unless --changed-files says otherwise',
                      user='the file must be accessible')

    def matches(self, file: OpenFile) -> bool:
        return (stat.S_ISREG(file.stat.st_mode) and not file.is_path and not on_shm_mount(file.stat)
                and file.magic not in _NOT_FILES and not is_of_dead_process(file))

    def findings(self, file: OpenFile) -> list[Finding]:
        if file.deleted:
            return [*self._deleted(file), *flag_findings(file)]
        if rows := hidden_findings(file):
            return rows
        if file.magic == statfs.PROC_SUPER_MAGIC and of_process(file.path):
            return [finding('ENOENT', f'{file.path} belongs to a process',
                            'a restart needs a process with that pid', 'warning')]
        if not os.access(file.proc_path, access_of(file.flags), effective_ids=True):
            return [finding('EACCES', f'{file.path} may not be opened again', 'its mode or owner has changed since it '
                            'was opened: put it back before a restart, or restore as root', 'warning')]
        return []

    def _deleted(self, file: OpenFile) -> list[Finding]:
        if file.stat.st_nlink:
            return link_findings(DeletedFile.of(file))
        if file.unread or not os.access(file.proc_path, os.R_OK, effective_ids=True):
            return [finding('EACCES', f'{file.path} is deleted and its content cannot be read',
                            'run as root, or give the file a name (ln) before the checkpoint')]
        if any(lock.kind == LEASE for lock in read_locks(file)):
            # opening a leased file breaks the lease (fcntl(2)), and a deleted file must be opened for its content
            return [finding('EBUSY', f'{file.path} is deleted and leased', 'release the lease (F_SETLEASE, F_UNLCK)')]
        return []

    def dump(self, file: OpenFile, content: Content) -> Regular:
        of = file.stat
        locks = read_locks(file)
        link = content.link_back(file) if file.deleted and of.st_nlink else ''
        is_saved, saved, tail = (0, (), b'') if file.deleted and not link else self._saved(file, content, locks)
        return Regular(file.path, of.st_dev, of.st_ino, of.st_size, max(of.st_mtime_ns, 0), of.st_mode, of.st_uid,
                       of.st_gid, of.st_nlink, file.magic, file.deleted,
                       () if link else self._content(file, content), locks, is_saved, saved, tail, link)

    def _content(self, file: OpenFile, content: Content) -> tuple[ContentSegment, ...]:
        if not file.deleted:
            return ()
        with file.reopen(os.O_RDONLY) as fd:
            return dump_content(fd, file.stat.st_size, content)

    def _saved(self, file: OpenFile, content: Content,
               locks: tuple[Lock, ...]) -> tuple[int, tuple[ContentSegment, ...], bytes]:
        """Save the content for a rollback: of a file that the tree writes and that is readable."""
        written = content.written(file)
        # opening a leased file breaks the lease
        if not written or file.magic in statfs.MADE_UP or any(lock.kind == LEASE for lock in locks):
            return 0, (), b''
        if file.unread and not content.reads(file):
            return 0, (), b''
        segments = content.save(file)
        try:
            with open_quietly(file) as fd:
                tail = digest_tail(fd, file.stat.st_size)
        except PermissionError:
            tail = b''
        return int(segments is not None), segments or (), tail

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: Regular, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if record.deleted and not record.link:
            return [*deleted_findings(record.path, lookup),
                    *owner_findings(record.path, record.uid, record.gid, lookup)]
        if self.late(record, saved):
            return []       # its process is not yet made
        found = lookup.lstat(record.place)
        if record.link and (found is None or found.st_ino != record.inode):
            return [finding('ENOENT', *lost_name(record.path, record.link))]
        words = changes(_identity(record), found)
        if found is None:
            return self._missing(record, lookup)
        if not stat.S_ISREG(found.st_mode):
            return [finding('ESTALE', f'{record.place} {words[0]}', 'put the file back')]
        if not lookup.may(record.place, access_of(saved.flags)):
            return [finding('EACCES', f'{record.place} cannot be {_VERBS[access_of(saved.flags)]}',
                            'run as its owner, or as root')]
        rows = [self._changed(record, words, found, lookup)] if words else []
        return rows + lock_findings(record.locks, record.place, lookup)

    def _missing(self, record: Regular, lookup: FileLookup) -> list[Finding]:
        missing = f'{record.path} {MISSING}'
        if not record.is_saved or lookup.changed_files != 'rollback':
            how = ', or have it made again by --changed-files=rollback' if record.is_saved else ''
            return [finding('ENOENT', missing, f'put the file back where it was{how}')]
        home = str(PurePath(record.path).parent)
        found = lookup.lstat(home)
        if found and stat.S_ISDIR(found.st_mode) and lookup.may(home, os.W_OK | os.X_OK):
            return [finding('ENOENT', missing, 'the rollback makes it again as it was saved', 'warning'),
                    *owner_findings(record.path, record.uid, record.gid, lookup)]
        return [finding('ENOENT', f'{missing} and cannot be made again in {home}',
                        'make that directory, writable for the owner of the tree')]

    def _changed(self, record: Regular, words: list[str], found: os.stat_result, lookup: FileLookup) -> Finding:
        how = f'{record.place} {" and ".join(words)}'
        if lookup.changed_files == 'accept':
            return finding('ESTALE', how, 'the tree finds it as it is now', 'warning')
        if lookup.changed_files == 'refuse':
            return finding('ESTALE', how, '--changed-files=accept uses it as it is, rollback puts it back if the '
                           'checkpoint was made with --save-files or it was only appended to')
        why = self._no_rollback(record, found, lookup)
        if why:
            return finding('ESTALE', f'{how}, and cannot be put back: {why}',
                           'checkpoint with --save-files, or use --changed-files=accept')
        return finding('ESTALE', how, 'the rollback puts it back as it was', 'warning')

    def _no_rollback(self, record: Regular, found: os.stat_result, lookup: FileLookup) -> str:
        """Explain why the file cannot be rolled back, '' if it can."""
        if not lookup.may(record.place, os.R_OK | os.W_OK):
            return 'it is not readable and writable'
        if any(lock.kind == LEASE for lock in record.locks):
            return 'it is leased'
        if short := _lacking(record, found, lookup):
            return f'its file system lacks {short:,} bytes for that'
        if record.is_saved or only_appended(record.place, _identity(record), record.tail, found, lookup):
            return ''
        if not record.tail:
            return 'the tree did not have it open for writing, or its content could not be read'
        return 'its content was not saved, and it was not only appended to'

    def needs(self, record: Regular, saved: SavedFile) -> Needs | None:
        return deleted_takes(record.path, record.device, record.inode, record.content) if record.content else None

    def late(self, record: Regular, saved: SavedFile) -> bool:
        return record.file_system == statfs.PROC_SUPER_MAGIC and of_process(record.path)

    def create(self, record: Regular, saved: SavedFile, ctx: RestoreContext) -> int:
        if record.link:
            return self._restore_linked(record, saved, ctx)
        if record.deleted:
            return self._restore_deleted(record, saved, ctx)
        if ctx.changed_files == 'rollback' and record.is_saved and ctx.lstat(record.path) is None:
            ctx.make_file(record.path, lambda fd: _fill(record, fd, ctx))
        return self._opened(record, ctx.open(record.path, opening(saved.flags)), ctx)

    def _restore_linked(self, record: Regular, saved: SavedFile, ctx: RestoreContext) -> int:
        fd = ctx.open_linked(record.link, record.path, opening(saved.flags))
        if os.fstat(fd).st_ino != record.inode:
            os.close(fd)
            raise CkptError(f'{record.link} is another file now', errno=errno.ESTALE, resource=record.path)
        return self._opened(record, fd, ctx)

    @staticmethod
    def _opened(record: Regular, fd: int, ctx: RestoreContext) -> int:
        words = changes(_identity(record), os.fstat(fd))
        # the file was checked before, and changes since then must be noticed
        if words and (ctx.changed_files == 'refuse' or not stat.S_ISREG(os.fstat(fd).st_mode)):
            os.close(fd)
            raise CkptError(f'{record.place} {" and ".join(words)}', errno=errno.ESTALE, resource=record.path)
        return fd

    def _restore_deleted(self, record: Regular, saved: SavedFile, ctx: RestoreContext) -> int:
        base = deleted_file(record.path, record.device, record.inode, record.size, record.mode, record.content, ctx)
        set_owner(base, record.mode, record.uid, record.gid, ctx)
        fd = open_nameless(base, saved.flags, ctx)
        with ctx.as_user():
            os.utime(base, ns=(record.mtime, record.mtime))
        return fd

    def connect(self, record: Regular, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        restore_locks(record.locks, record.place, saved, fd, ctx)

    def commit(self, record: Regular, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        if ctx.changed_files == 'rollback' and (record.tail or record.is_saved):
            roll_back(record.place, _identity(record), record.saved if record.is_saved else None, record.tail, fd, ctx)


def _fill(record: Regular, fd: int, ctx: RestoreContext) -> None:
    """Write the saved content of a named file into a new one."""
    restore_content(fd, record.size, record.saved, ctx)
    set_owner(fd, record.mode, record.uid, record.gid, ctx)
    with ctx.as_user():
        os.utime(fd, ns=(record.mtime, record.mtime))


def _lacking(record: Regular, found: os.stat_result, lookup: FileLookup) -> int:
    """Return the bytes that the file system lacks for the saved content; 0 if it has enough."""
    try:
        fd = lookup.open(record.place, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return 0        # this is reported separately
    try:
        room = os.fstatvfs(fd)
    finally:
        os.close(fd)
    wanted = sum(segment.extent.length for segment in record.saved) - found.st_blocks * 512
    return max(wanted - room.f_bavail * room.f_frsize, 0)


def _identity(record: Regular) -> FileIdentity:
    return FileIdentity(record.mode, record.inode, record.size, record.mtime, record.file_system in statfs.MADE_UP)

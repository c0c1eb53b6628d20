# SPDX-License-Identifier: LGPL-2.1-or-later
"""A mapped file."""

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ckptd.errors import CkptError, Finding
from ckptd.image.identity import FileIdentity, changes
from ckptd.image.reader import ImageReader
from ckptd.image.records import FILE_PRIVATE, FILE_SHARED, Backing, Extent, Mm, SavedFile, Vma
from ckptd.kernel.maps import DELETED, Mapping, map_file, stat_mapped
from ckptd.kernel.namei import lstat_of_task, root_of_task
from ckptd.kernel.shmem import is_object_of_shm_mount, is_of_shm_mount
from ckptd.objects.attributes.base import about
from ckptd.objects.files.base import FileLookup, Needs, finding
from ckptd.objects.files.deleted import deleted_file, deleted_findings, deleted_takes, home_of, open_nameless, whole
from ckptd.objects.files.linked import DeletedFile, link_findings, lost_name
from ckptd.objects.files.other_names import is_link, is_name, living_name
from ckptd.objects.mappings.base import (
    RELEASE,
    Links,
    MappingCheck,
    MappingContext,
    MappingKind,
    MappingMeans,
    MappingTables,
    PageCopier,
    View,
    may_write,
)
from ckptd.objects.support import Support

_DEV_ZERO = os.makedev(1, 5)
# Bytes; the content of a file that is mapped for writing is kept up to this size although it has a name. One example is
# Java's statistics, /tmp/hsperfdata_USER/PID: once their process is dead, the next java or a boot removes them.
KEPT_SIZE = 1 << 20
_KEPT = 'is not the file that it was: the tree gets its own, with the content that the image has, and without a name'
_OTHERS = 'others do not see what the tree writes there from then on: put the file back if they should'


class FileMapping(MappingKind, numbers=[FILE_PRIVATE, FILE_SHARED]):
    """A mapping of a file with a name, or of one that has lost its name."""
    support = Support('mapped files; of private ones, the pages that were written',
                      refused='a file that has changed since, unless --changed-files says otherwise',
                      warned='a file that another one hides now', user='the file must be accessible')

    def __init__(self, tables: MappingTables) -> None:
        super().__init__(tables)
        self._checked: dict[tuple[int, int, int, str], Finding | None] = {}
        self._backings: list[Backing] = []
        self._kept: dict[int, View] = {}        # index into _backings, a view to read the content by
        self._ids: dict[tuple[int, int, int, str], int] = {}

    def matches(self, mapping: Mapping) -> bool:
        return not mapping.anonymous and not is_object_of_shm_mount(mapping)

    def finding(self, tid: int, mapping: Mapping) -> Finding | None:
        """Check a file once, because a thousand processes may map the same libraries. A warning appears once in the
        tree."""
        if not mapping.path.startswith('/') or is_of_shm_mount(mapping):
            return None
        key = (mapping.major, mapping.minor, mapping.inode, mapping.path)
        if key in self._checked:
            return self._checked[key]
        found = _check_file(tid, mapping)
        self._checked[key] = found if found and found.severity == 'refusal' else None
        return found

    def object_of(self, view: View) -> tuple[int, int]:
        mapping = view.mapping
        key = (mapping.major, mapping.minor, mapping.inode, mapping.path)
        if key not in self._ids:
            record = _describe(len(self._backings) + 1, view)
            self._ids[key] = record.backing_id
            self._backings.append(record)
        index = self._ids[key] - 1
        if _goes_along(self._backings[index], mapping):
            self._kept.setdefault(index, view)
        return FILE_SHARED if mapping.shared else FILE_PRIVATE, self._ids[key]

    def copy(self, copier: PageCopier, links: Links) -> None:
        for index, view in self._kept.items():
            self._backings[index] = _with_content(self._backings[index], view, copier, links)

    def records(self) -> list[Backing]:
        return self._backings

    # ------------------------------------------------------------ restart

    def restart_findings(self, context: MappingCheck) -> Iterator[Finding]:
        """Check the mapped files, by their first user and by the access that each needs: os.R_OK ..."""
        return map(context.by_whom, _findings(context))

    def needs(self, reader: ImageReader, lookup: FileLookup) -> Iterator[Needs]:
        for backing in reader.every(Backing):
            if not _is_at_link(backing, lookup) and (backing.deleted or _missing_but_kept(backing, lookup)):
                yield deleted_takes(backing.path, backing.device, backing.inode, whole(backing.content))

    def fd(self, number: int, means: MappingMeans, *, writable: bool) -> int:
        """Return the fd of a mapped file or executable."""
        files, record = means.files, means.reader.get(Backing, number)
        flags = os.O_RDWR if writable else os.O_RDONLY
        if _is_at_link(record, files):
            return files.once(('backing', number, writable), lambda: _open_linked(record, flags, files))
        if record.deleted or _missing_but_kept(record, files):
            base = deleted_file(record.path, record.device, record.inode, record.size, record.mode,
                                whole(record.content), files)
            return files.once(('backing', number), lambda: open_nameless(base, os.O_RDWR, files)) if writable else base
        return files.once(('backing', number, writable), lambda: files.open(record.path, flags))


# ---------------------------------------------------------------- findings

def _check_file(tid: int, mapping: Mapping) -> Finding | None:
    mapped = stat_mapped(tid, mapping)
    named = lstat_of_task(tid, mapping.file_path)
    is_there = named is not None and named.st_ino == (mapped.st_ino if mapped else mapping.inode)
    of = mapped or (named if is_there else None)
    if of and stat.S_ISCHR(of.st_mode):
        return None if of.st_rdev == _DEV_ZERO else _device('character', mapping, of)
    if of and stat.S_ISBLK(of.st_mode):
        return _device('block', mapping, of)
    if is_there or (mapping.deleted and _living_name(tid, mapping, mapped)):
        return None
    if mapped is None and mapping.deleted:
        return finding('EPERM', f'{mapping.file_path} is deleted and its content cannot be read',
                       'run ckptd as root (it needs CAP_CHECKPOINT_RESTORE for /proc/PID/map_files)')
    if mapping.deleted and mapped and mapped.st_nlink:
        file = DeletedFile(tid, tid, mapping.file_path, mapped, map_file(tid, mapping))
        return next(iter(link_findings(file)), None)
    if mapping.deleted:
        return None         # its content goes into the image
    return finding('ENOENT', f'{mapping.path} is another file now, or hidden by a mount',
                   'a restart maps files by path: remove the mount or put the file back', 'warning')


def _device(sort: str, mapping: Mapping, of: os.stat_result) -> Finding:
    number = f'{os.major(of.st_rdev)}:{os.minor(of.st_rdev)}'
    return finding('EOPNOTSUPP', f'memory of the {sort} device {number}: {mapping.path}', RELEASE)


# ---------------------------------------------------------------- dump

def _describe(number: int, view: View) -> Backing:
    mapping = view.mapping
    mapped = stat_mapped(view.tid, mapping) if mapping.size else os.stat(view.magic_link)  # noqa: PTH116
    # a name may itself end in " (deleted)": only the inode is certain
    for path in (mapping.path, mapping.file_path):
        named = lstat_of_task(view.tid, path)
        if named is not None and (os.path.samestat(named, mapped) if mapped else named.st_ino == mapping.inode):
            # st_dev and not the numbers in maps: on btrfs and overlayfs they differ, and a restart compares with
            # stat(2)
            return Backing(number, path, named.st_dev, named.st_ino, named.st_size, named.st_mtime_ns, named.st_mode, 0,
                           ())
    if mapped is None and not mapping.deleted:
        # we can neither see nor open it, so use the kernel's numbers, by which a restart identifies it
        return Backing(number, mapping.path, os.makedev(mapping.major, mapping.minor), mapping.inode, 0, 0, 0, 0, ())
    return Backing(number, mapping.file_path, 0, mapping.inode, 0, 0, 0, 1, (),
                   _living_name(view.tid, mapping, mapped) if mapping.deleted else '')


def _living_name(tid: int, mapping: Mapping, mapped: os.stat_result | None) -> str:
    """Return a living name of a deleted file; '' if none is found. Without the right to see the file itself, it is
    identified by the numbers in maps, which on most file systems are those of stat(2)."""
    if mapped is None:
        return living_name(tid, mapping.file_path, os.makedev(mapping.major, mapping.minor), mapping.inode)
    return living_name(tid, mapping.file_path, mapped.st_dev, mapped.st_ino) if mapped.st_nlink else ''


def _goes_along(backing: Backing, mapping: Mapping) -> bool:
    """Whether to keep the content: of a deleted file, or a small one that is written through the mapping, since it may
    not exist later."""
    written = mapping.shared and mapping.write and stat.S_ISREG(backing.mode) and backing.size <= KEPT_SIZE
    return bool(backing.deleted) or written


def _with_content(backing: Backing, view: View, copier: PageCopier, links: Links) -> Backing:
    """Return the record of a file with its content. A file with a name has none if the mapping cannot be opened:
    proc_pid_map_files(5) requires CAP_CHECKPOINT_RESTORE."""
    try:
        fd = _open_mapped(backing, view)
    except PermissionError:
        if backing.deleted:
            raise
        return backing
    try:
        at = os.fstat(fd)
        if backing.link and at.st_size > KEPT_SIZE:
            return _of(backing, at, (), backing.link)
        content = copier.copy_whole(fd, at.st_size)
        # `deleted` is set as well for a file that is only out of our reach by its path
        is_linked = backing.deleted and at.st_nlink and str(Path(f'/proc/self/fd/{fd}').readlink()).endswith(DELETED)
        link = backing.link
        if is_linked and not link:
            link = links.link(DeletedFile(view.tid, view.tid, backing.path, at, view.magic_link), fd)
    finally:
        os.close(fd)
    return _of(backing, at, (content,), link)


def _open_mapped(backing: Backing, view: View) -> int:
    """Open a mapped file for reading: by its mapping or, if we may not, by the living name that it has."""
    try:
        return os.open(view.magic_link, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if not backing.link:
            raise
    return os.open(root_of_task(view.tid) + backing.link, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _of(backing: Backing, at: os.stat_result, content: tuple[Extent, ...], link: str) -> Backing:
    return Backing(backing.backing_id, backing.path, at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_mode,
                   backing.deleted, content, link)


# ---------------------------------------------------------------- restart

def _is_at_link(record: Backing, lookup: FileLookup) -> bool:
    """Whether a deleted file that has another name is opened by that. A living name may be gone by now, with the file.
    Then the tree gets the file again without a name, if the image has its content."""
    if not record.link or is_name(record.link) or not record.content:
        return bool(record.link)
    found = lookup.lstat(record.link)
    return found is not None and found.st_ino == record.inode


def _missing_but_kept(record: Backing, lookup: FileLookup) -> bool:
    """Whether a mapped file that had a name is gone, while its content is in the image. It is then made again without a
    name. A file of that name that belongs to another process, as with Java's statistics, is left alone."""
    if record.deleted or not record.content:
        return False
    found = lookup.lstat(record.path)
    return found is None or (found.st_ino != record.inode and lookup.changed_files != 'accept')


def _open_linked(record: Backing, flags: int, files: MappingContext) -> int:
    """Open a deleted file that has another name by the name that the checkpoint gave it."""
    fd = files.open_linked(record.link, record.path, flags)
    if os.fstat(fd).st_ino != record.inode:
        os.close(fd)
        raise CkptError(f'{record.link} is another file now', errno=errno.ESTALE, resource=record.path)
    return fd


def _findings(context: MappingCheck) -> Iterator[Finding]:
    users = context.mm_users
    first: dict[int, tuple[int, str]] = {}
    access: dict[int, int] = {}
    for vma in context.reader.every(Vma):
        if vma.kind in (FILE_PRIVATE, FILE_SHARED) and vma.mm_id in users:
            first.setdefault(vma.object, (users[vma.mm_id], f'vma {vma.start:x}-{vma.end:x}'))
            wanted = os.R_OK | (os.W_OK if vma.kind == FILE_SHARED and may_write(vma) else 0)
            access[vma.object] = access.get(vma.object, 0) | wanted
    for mm in context.reader.every(Mm):
        if mm.mm_id in users and mm.exe:
            first.setdefault(mm.exe, (users[mm.mm_id], 'exe'))
            # PR_SET_MM_EXE_FILE requires the right to execute (kernel/sys.c, prctl_set_mm_exe_file)
            access[mm.exe] = access.get(mm.exe, 0) | os.R_OK | os.X_OK
    opened = {saved.link for saved in context.reader.every(SavedFile)}
    for number, (vpid, resource) in first.items():
        yield from _check_backing(context, context.reader.get(Backing, number), vpid, resource, access[number], opened)


def _check_backing(context: MappingCheck, record: Backing, vpid: int, resource: str, access: int, opened: set[str]
                   ) -> Iterator[Finding]:
    if _is_at_link(record, context.lookup):
        yield from _check_linked(context, record, vpid, resource, access)
        return
    if record.link:
        yield about(vpid, resource, 'ENOENT', f'{record.link} {_KEPT}', _OTHERS, 'warning')
    if record.deleted:
        if row := context.out_of_reach(vpid, resource, home_of(record.path, context.lookup)):
            yield row
        for one in deleted_findings(record.path, context.lookup):
            yield replace(one, pid=vpid, resource=resource)
        return
    if row := context.out_of_reach(vpid, resource, record.path):
        yield row
        return
    if not record.mode:
        return          # it was not accessible when it was dumped
    if _missing_but_kept(record, context.lookup):
        for one in deleted_findings(record.path, context.lookup):
            yield replace(one, pid=vpid, resource=resource)
        yield about(vpid, resource, 'ENOENT', f'{record.path} {_KEPT}', _OTHERS, 'warning')
        return
    found = context.lookup.lstat(record.path)
    words = changes(FileIdentity.of_backing(record), found)
    how = f'{record.path} {" and ".join(words)}'
    # if the file is open as well, its kind reports whether it can be rolled back
    rolled_back = context.lookup.changed_files == 'rollback' and record.path in opened
    if found is None:
        if not rolled_back:
            yield about(vpid, resource, 'ENOENT', how, 'put the file back where it was')
    elif stat.S_IFMT(found.st_mode) != stat.S_IFMT(record.mode):
        yield about(vpid, resource, 'ESTALE', how, 'put the file back')
    elif not context.lookup.may(record.path, access):
        yield about(vpid, resource, 'EACCES', f'{record.path} may not be {_verbs(access)}',
                    'run as its owner, or as root')
    elif words and context.lookup.changed_files == 'accept':
        yield about(vpid, resource, 'ESTALE', how, 'the tree finds it as it is now', 'warning')
    elif words and not rolled_back:
        yield about(vpid, resource, 'ESTALE', how, 'put exactly this file back (of a package: the same version); '
                    '--changed-files=accept uses the present file, at the risk of a crash')


def _check_linked(context: MappingCheck, record: Backing, vpid: int, resource: str, access: int) -> Iterator[Finding]:
    found = context.lookup.lstat(record.link)
    if found is None or found.st_ino != record.inode or not is_link(record.link):
        reason, hint = lost_name(record.path, record.link)
        yield about(vpid, resource, 'ENOENT', reason, hint)
    elif not context.lookup.may(record.link, access):
        yield about(vpid, resource, 'EACCES', f'{record.link} may not be {_verbs(access)}',
                    'run as its owner, or as root')


def _verbs(access: int) -> str:
    names = {os.R_OK: 'read', os.W_OK: 'written', os.X_OK: 'executed'}
    return ' and '.join(name for bit, name in names.items() if access & bit)

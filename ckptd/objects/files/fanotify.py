# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fanotify group and its marks (fanotify(7)). fdinfo shows both; a mark is kept by the path of what it is on.

Marks are set again as the last step of a restart, so that its own work causes no event. Before that they are tried in
another group, which finds all errors.
"""

import errno
import os
from collections.abc import Mapping
from contextlib import suppress

from ckptd.errors import CkptError, Finding, NotSupported
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.creds import CAP_SYS_ADMIN
from ckptd.kernel.fanotify import (
    FAN_MARK_FILESYSTEM,
    FAN_MARK_INODE,
    FAN_MARK_MOUNT,
    PERMISSION_EVENTS,
    FanotifyMark,
    fanotify_init,
    group_of,
    marks_of,
    set_mark,
)
from ckptd.kernel.inotify import InotifyWatch, unread_bytes
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.namei import lstat_of_task, root_of_task
from ckptd.objects.files.base import Content, FileLookup, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.watched import paths_by_handle
from ckptd.objects.support import Support

_LINK = 'anon_inode:[fanotify]'
_PLACES = (FAN_MARK_INODE, FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM)
_NAMES = {FAN_MARK_INODE: 'file', FAN_MARK_MOUNT: 'mount', FAN_MARK_FILESYSTEM: 'file system'}


@layout
class SavedMark(Struct):
    """A mark. on: index into _PLACES."""
    on: U8
    path: str       # from the root of the mount namespace
    inode: U64      # of a marked file or directory
    flags: U32      # FAN_MARK_*
    mask: U64
    ignored: U64


@layout
class Fanotify(Struct):
    flags: U32              # of fanotify_init(2)
    event_flags: U32        # O_* of the files that come with events
    marks: tuple[SavedMark, ...]
    unread: U32             # bytes of events that the program had not read


class FanotifyKind(Kind[Fanotify], tag='fanotify', alike=False):
    support = Support('fanotify groups, with their marks', restored='partly',
                      refused='marks for permission events, and of files whose path cannot be found',
                      warned='unread events', user='refused')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._fds: list[int] = []                                               # ours, until `close`
        self._armed: dict[int, list[tuple[FanotifyMark, int]]] = {}             # marks and O_PATH fds, by file_id

    def matches(self, file: OpenFile) -> bool:
        return file.link == _LINK and not file.is_path

    def findings(self, file: OpenFile) -> list[Finding]:
        rows = []
        marks = marks_of(file.info)
        if any(mark.mask & PERMISSION_EVENTS for mark in marks):
            rows.append(finding('EOPNOTSUPP', 'a fanotify group decides about accesses of other programs (permission '
                                'events), which would wait for it', 'let it remove these marks before the checkpoint'))
        paths = self._paths(file)
        errno_ = 'EOPNOTSUPP' if self._tables.has_handles else 'EPERM'
        rows += [finding(errno_, _nameless(mark), 'checkpoint it as root; or let the program remove the mark')
                 for number, mark in enumerate(marks) if number not in paths]
        if size := _unread(file):
            rows.append(finding('ENOMSG', f'{size:,} bytes of events wait in a fanotify group, and the image lacks '
                                'them', 'the running program still reads them; after a restart they are lost',
                                'warning'))
        return rows

    def dump(self, file: OpenFile, content: Content) -> Fanotify:
        paths, group = self._paths(file), group_of(file.info)
        marks = tuple(self._saved(file, mark, paths.get(number, ''))
                      for number, mark in enumerate(marks_of(file.info)))
        return Fanotify(*group, marks, _unread(file))

    def _saved(self, file: OpenFile, mark: FanotifyMark, path: str) -> SavedMark:
        found = lstat_of_task(self._task_of(file), path) if path else None
        if found is None:
            raise NotSupported(f'task {file.pid}: fd {file.fd}: {_nameless(mark)}', task=file.pid,
                               resource=f'fd {file.fd}', hint='let the program remove the mark')
        return SavedMark(_PLACES.index(mark.on), path, found.st_ino, mark.flags, mark.mask, mark.ignored)

    def _paths(self, file: OpenFile) -> Mapping[int, str]:
        """Return the paths of the marks by index, as far as they are found."""
        tid, marks = self._task_of(file), marks_of(file.info)
        mounts = read_mountinfo(tid if root_of_task(tid) else None)
        found: dict[int, str] = {}
        for number, mark in enumerate(marks):
            places = [mount.mount_point for mount in mounts
                      if (mark.on == FAN_MARK_MOUNT and mount.id == mark.mount)
                      or (mark.on == FAN_MARK_FILESYSTEM and os.makedev(mount.major, mount.minor) == mark.device)]
            if places:
                found[number] = places[0]
        watches = [InotifyWatch(number, 0, mark.device, mark.inode, mark.handle) for number, mark in enumerate(marks)
                   if mark.on == FAN_MARK_INODE]
        if self._tables.has_handles and watches:
            with suppress(OSError):
                found |= paths_by_handle(tid, watches)
        return found

    def _task_of(self, file: OpenFile) -> int:
        """Return a task that sees the paths. A file in flight is known by an fd of ours."""
        return self._tables.table_owners[0] if file.pid == os.getpid() and self._tables.table_owners else file.tid

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        self._armed.clear()

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: Fanotify, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        rows = []
        if lookup.uid or not lookup.capable(CAP_SYS_ADMIN):
            rows.append(finding('EPERM', 'a fanotify group watches files of others, which needs CAP_SYS_ADMIN',
                                'restore it as root'))
        if record.unread:
            rows.append(finding('ENOMSG', f'{record.unread:,} bytes of events that waited in a fanotify group are lost',
                                'let the program read them before the checkpoint', 'warning'))
        for mark in record.marks:
            found = lookup.lstat(mark.path)
            if mark.on >= len(_PLACES) or mark.mask & PERMISSION_EVENTS:
                rows.append(finding('EBADMSG', f'{mark.path} has a fanotify mark that no checkpoint makes',
                                    'use an image that is not damaged'))
            elif found is None:
                rows.append(finding('ENOENT', f'{mark.path}, which has a fanotify mark, is missing',
                                    'put the file back where it was'))
            elif found.st_ino != mark.inode and not _PLACES[mark.on]:
                rows.append(finding('ESTALE', f'{mark.path}, which has a fanotify mark, is another file (inode '
                                    f'{found.st_ino}, not {mark.inode})', 'put the file back, or watch this one: '
                                    '--changed-files=accept', 'warning' if lookup.changed_files == 'accept'
                                    else 'refusal'))
        return rows

    def create(self, record: Fanotify, saved: SavedFile, ctx: RestoreContext) -> int:
        return _make(record, saved)

    def connect(self, record: Fanotify, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        armed = self._armed.setdefault(saved.file_id, [])
        self._fds.append(trial := _make(record, saved))
        for one in record.marks:
            mark = FanotifyMark(_PLACES[one.on], one.flags, one.mask, one.ignored)
            try:
                file = ctx.open(one.path, os.O_PATH | os.O_NOFOLLOW)
                self._fds.append(file)
                set_mark(trial, mark, file)
            except OSError as error:
                raise CkptError(f'{one.path} cannot be marked again for fanotify: {error.strerror}',
                                errno=error.errno, resource=saved.link) from error
            armed.append((mark, file))
        self._fds.remove(trial)
        os.close(trial)

    def arm(self, record: Fanotify, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        for mark, file in self._armed.pop(saved.file_id):
            with suppress(OSError):     # it was tried before; a file system that has gone since has no events
                set_mark(fd, mark, file)


def _make(record: Fanotify, saved: SavedFile) -> int:
    try:
        fd = fanotify_init(record.flags, record.event_flags)
    except OSError as error:
        raise CkptError(f'a fanotify group cannot be made again: {error.strerror}', errno=error.errno or errno.EIO,
                        resource=saved.link, hint='restore it as root, on a kernel as new as the old one') from error
    os.set_inheritable(fd, False)
    return fd


def _nameless(mark: FanotifyMark) -> str:
    what = f'inode {mark.inode} of device' if mark.on == FAN_MARK_INODE else f'{_NAMES[mark.on]}'
    return (f'a fanotify mark is on {what} {os.major(mark.device)}:{os.minor(mark.device)}, whose path is not known')


def _unread(file: OpenFile) -> int:
    with file.duplicate() as fd:
        return unread_bytes(fd)

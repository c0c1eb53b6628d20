# SPDX-License-Identifier: LGPL-2.1-or-later
"""An inotify instance: its watches, and the numbers that the program knows them by (inotify(7)).

A watch is kept by the path of its file. One of a file without a path is kept by an open file of the tree with the same
inode, which a restart makes again. Unread events cannot be read without taking them from the program, and cannot be put
back. So they stay where they are, and the image lacks them.

A restart adds the watches twice: `connect` adds them without any event, which finds all errors, and `arm` sets their
masks when the restart touches no file any more. So its own work causes no event.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress

from ckptd.errors import CkptError, Finding, NotSupported
from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.image.identity import FileIdentity, changes
from ckptd.image.records import SavedFile
from ckptd.kernel import statfs
from ckptd.kernel.inotify import (
    INOTIFY_IOC_SETNEXTWD,
    KEPT_BITS,
    InotifyWatch,
    inotify_init1,
    inotify_rm_watch,
    set_watch,
    unread_bytes,
    watches_of,
)
from ckptd.kernel.namei import lstat_of_task, root_of_task
from ckptd.kernel.status import read_status
from ckptd.objects.files.base import (
    Content,
    FileLookup,
    Kind,
    OpenFile,
    RestoreContext,
    finding,
    of_process,
    read_open_file,
)
from ckptd.objects.files.tables import JobTables
from ckptd.objects.files.watched import INOTIFY_LINK, WatchedFile
from ckptd.objects.support import Support

_HINT = 'let the program open the file and leave it open, or remove the watch before the checkpoint'
_HINT_FOR_USERS = f'checkpoint it by a ckptd that runs as root; or {_HINT}'


@layout
class SavedWatch(Struct):
    """A watch."""
    wd: U32
    mask: U32
    path: str       # from the root of the mount namespace; '' for a file without one
    file_id: U32    # of an open file with the same inode, if there is no path; else 0
    mode: U32       # st_mode
    inode: U64      # st_ino; 0 on a file system that generates its files


@layout
class InotifyInstance(Struct):
    watches: tuple[SavedWatch, ...]     # by wd
    unread: U32                         # bytes of events that the program had not read


class InotifyKind(Kind[InotifyInstance], tag='inotify', alike=False):
    support = Support('inotify instances, with their watches', restored='partly',
                      refused='watches of files whose path cannot be found', warned='unread events',
                      user='paths are found only near files that the tree has open')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._places: dict[tuple[str, ...], Mapping[int, WatchedFile]] = {}     # by the lines of fdinfo
        self._fds: list[int] = []                                               # ours, until `close`
        self._armed: dict[int, list[tuple[SavedWatch, int]]] = {}               # watches and O_PATH fds, by file_id

    def matches(self, file: OpenFile) -> bool:
        return file.link == INOTIFY_LINK and not file.is_path

    def findings(self, file: OpenFile) -> list[Finding]:
        places = self._find(file)
        errno_, hint = ('EOPNOTSUPP', _HINT) if self._tables.has_handles else ('EPERM', _HINT_FOR_USERS)
        rows = [finding(errno_, _nameless(watch), hint)
                for watch in watches_of(file.info) if watch.wd not in places]
        if size := _unread(file):
            rows.append(finding('ENOMSG', f'{size:,} bytes of events wait in an inotify instance, and the image lacks '
                                'them', 'the running program still reads them; after a restart they are lost',
                                'warning'))
        return rows

    def dump(self, file: OpenFile, content: Content) -> InotifyInstance:
        places = self._find(file)
        return InotifyInstance(tuple(self._saved(file, watch, places.get(watch.wd), content)
                             for watch in watches_of(file.info)), _unread(file))

    def _find(self, file: OpenFile) -> Mapping[int, WatchedFile]:
        """Return the places of the watched files by wd, each looked up once."""
        key = tuple(file.info.fields.get('inotify', ()))
        if key not in self._places:
            watches = watches_of(file.info)
            paths = self._paths(file)
            found = {wd: WatchedFile(path) for wd, path in paths.items()}
            if rest := [watch for watch in watches if watch.wd not in found]:
                found |= self._tables.neighbourhood.find(rest)
            self._places[key] = found
        return self._places[key]

    def _paths(self, file: OpenFile) -> Mapping[int, str]:
        """Return the paths that handles lead to. A mount that does not answer leads nowhere."""
        try:
            return self._tables.watched_paths(file, self._task_of(file))
        except ProcessLookupError:
            raise
        except OSError:
            return {}

    def _task_of(self, file: OpenFile) -> int:
        """Return a task that sees the paths. A file in flight is known by an fd of ours."""
        return self._tables.table_owners[0] if file.pid == os.getpid() and self._tables.table_owners else file.tid

    def _saved(self, file: OpenFile, watch: InotifyWatch, place: WatchedFile | None, content: Content) -> SavedWatch:
        if place and place.path:
            tid = self._task_of(file)
            if found := lstat_of_task(tid, place.path):
                inode = 0 if _is_made_up(root_of_task(tid) + place.path, found) else found.st_ino
                return SavedWatch(watch.wd, watch.mask, place.path, 0, found.st_mode, inode)
        elif place:
            with read_open_file(read_status(place.tid).tgid, place.fd, place.tid).duplicate() as fd:
                self._fds.append(os.dup(fd))    # the description is found by our fd
            of = os.fstat(self._fds[-1])
            return SavedWatch(watch.wd, watch.mask, '', content.file_id(self._fds[-1]), of.st_mode, of.st_ino)
        raise NotSupported(f'task {file.pid}: fd {file.fd}: {_nameless(watch)}', task=file.pid,
                           resource=f'fd {file.fd}', hint=_HINT)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        self._armed.clear()

    # ------------------------------------------------------------ restart

    def references(self, record: InotifyInstance) -> Iterable[int]:
        return (watch.file_id for watch in record.watches if not watch.path)

    def restart_findings(self, record: InotifyInstance, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        rows = []
        if record.unread:
            rows.append(finding('ENOMSG', f'{record.unread:,} bytes of events that waited in an inotify instance are '
                                'lost', 'let the program read them before the checkpoint', 'warning'))
        seen: dict[tuple[int, int], str] = {}
        for watch in record.watches:
            if not watch.path or of_process(watch.path):
                continue        # the file is not yet made
            found = lookup.lstat(watch.path)
            rows += _file_findings(watch, found, lookup)
            if found and (other := seen.setdefault((found.st_dev, found.st_ino), watch.path)) != watch.path:
                rows.append(finding('ESTALE', f'{watch.path}, which is watched, is the same file as {other} now',
                                    'an inotify instance watches a file once: put the files back'))
        return rows

    def create(self, record: InotifyInstance, saved: SavedFile, ctx: RestoreContext) -> int:
        return inotify_init1(saved.flags & os.O_NONBLOCK | os.O_CLOEXEC)

    def connect(self, record: InotifyInstance, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        armed = self._armed.setdefault(saved.file_id, [])
        for watch in record.watches:
            try:
                file = self._open(watch, ctx)
                # the last and highest number is followed by the next one that the program gets
                fcntl.ioctl(fd, INOTIFY_IOC_SETNEXTWD, watch.wd)
                got = _set(fd, file, 0, ctx)
            except (OSError, OverflowError) as error:
                raise _cannot_watch(watch, error) from error
            if got != watch.wd:
                raise CkptError(f'{watch.path or "a file"} cannot be watched again as number {watch.wd}: it is watched '
                                f'as {got}', errno=errno.EEXIST, resource=saved.link)
            armed.append((watch, file))

    def _open(self, watch: SavedWatch, ctx: RestoreContext) -> int:
        """Return an fd of ours of the watched file. OSError, CkptError if it has changed."""
        if not watch.path:
            self._fds.append(os.dup(ctx.fd_of(watch.file_id)))
            return self._fds[-1]
        self._fds.append(ctx.open(watch.path, os.O_PATH | os.O_NOFOLLOW))
        words = _changes(watch, os.fstat(self._fds[-1]))
        # the file was checked before, and changes since then must be noticed
        if words and _is_refused(watch, os.fstat(self._fds[-1]), ctx):
            raise CkptError(f'{watch.path}, which is watched, {words}', errno=errno.ESTALE, resource=watch.path)
        return self._fds[-1]

    def arm(self, record: InotifyInstance, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        for watch, file in self._armed.pop(saved.file_id):
            # Nothing may fail here. If the file was deleted or closed to the user meanwhile, the watch ends, and the
            # program reads that (IN_IGNORED).
            got = -1
            with suppress(OSError):
                got = _set(fd, file, watch.mask & KEPT_BITS, ctx)
            if got != watch.wd:
                for number in {watch.wd, got} - {-1}:
                    with suppress(OSError):
                        inotify_rm_watch(fd, number)


def _nameless(watch: InotifyWatch) -> str:
    return (f'watch {watch.wd} of an inotify instance is on inode {watch.inode} of device '
            f'{os.major(watch.device)}:{os.minor(watch.device)}, whose path is not known')


def _is_made_up(path: str, found: os.stat_result) -> bool:
    # statfs(2) follows a symbolic link
    return not stat.S_ISLNK(found.st_mode) and statfs.file_system(path) in statfs.MADE_UP


def _unread(file: OpenFile) -> int:
    with file.duplicate() as fd:
        return unread_bytes(fd)


def _set(fd: int, file: int, mask: int, ctx: RestoreContext) -> int:
    """Watch a file with the rights of the user. Root's would show the names in a directory to which the user's path may
    lead by now."""
    with ctx.as_user():
        return set_watch(fd, file, mask)


def _file_findings(watch: SavedWatch, found: os.stat_result | None, lookup: FileLookup) -> list[Finding]:
    if found is None:
        return [finding('ENOENT', f'{watch.path}, which is watched, is missing', 'put the file back where it was')]
    rows = []
    if words := _changes(watch, found):
        is_refused = _is_refused(watch, found, lookup)
        hint = ('put the file back, or watch this one: --changed-files=accept' if is_refused else
                'the program watches the one that is there now')
        rows.append(finding('ESTALE', f'{watch.path}, which is watched, {words}', hint,
                            'refusal' if is_refused else 'warning'))
    # a symbolic link can always be read; access(2) would follow it
    if not stat.S_ISLNK(found.st_mode) and not lookup.may(watch.path, os.R_OK):
        rows.append(finding('EACCES', f'{watch.path}, which is watched, is not readable',
                            'run as its owner, or as root'))
    return rows


def _changes(watch: SavedWatch, found: os.stat_result) -> str:
    """Say how the file differs, '' if it is the same. Its content does not matter."""
    of = FileIdentity(watch.mode, watch.inode, found.st_size, max(found.st_mtime_ns, 0), not watch.inode)
    if words := changes(of, found):
        return words[0]
    if watch.inode and found.st_ino != watch.inode:
        return f'is another one (inode {found.st_ino}, not {watch.inode})'
    return ''


def _is_refused(watch: SavedWatch, found: os.stat_result, lookup: FileLookup) -> bool:
    """Whether a changed file prevents a restart. A directory is watched for its names, which lead there still."""
    if stat.S_IFMT(watch.mode) != stat.S_IFMT(found.st_mode):
        return True
    return not stat.S_ISDIR(found.st_mode) and lookup.changed_files == 'refuse'


def _cannot_watch(watch: SavedWatch, error: Exception) -> CkptError:
    number = error.errno if isinstance(error, OSError) else errno.EINVAL
    hint = {errno.ENOSPC: 'raise the sysctl fs.inotify.max_user_watches',
            errno.ENOTTY: 'use a kernel with CONFIG_CHECKPOINT_RESTORE'}.get(number or 0, '')
    return CkptError(f'{watch.path or "a file"} cannot be watched again: {os.strerror(number or errno.EIO)}',
                     errno=number, resource=watch.path, hint=hint)

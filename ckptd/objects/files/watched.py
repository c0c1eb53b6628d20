# SPDX-License-Identifier: LGPL-2.1-or-later
"""Find the files that an inotify instance watches. fdinfo shows their inodes and file handles, not their names.

1. The kernel opens a file by its handle on a mount of its file system (root, or the broker for a user's worker). The
   link in /proc of that fd is a path, which is used if it leads to the file.
2. Some file systems cannot do that (overlayfs, proc, sysfs), and ordinary users may not. Then the file is searched
   among those that the tree has open, maps or works in, and in their directories. An inotify instance of our own, which
   watches the candidates and reports nothing, shows which of them is the inode.

Lookups by name and opens with O_PATH cause no events. The reading of a directory does, so directories are not searched
if the tree has a watch that reports this.
"""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import PurePath
from typing import NamedTuple

from ckptd.kernel.fdinfo import list_fds, read_fdinfo
from ckptd.kernel.fhandle import FileHandle, open_handle_here, working_directory
from ckptd.kernel.inotify import (
    IN_ACCESS,
    IN_CLOSE_NOWRITE,
    IN_DONT_FOLLOW,
    IN_ISDIR,
    IN_OPEN,
    Inotify,
    InotifyWatch,
    inotify_add_watch,
    watches_of,
)
from ckptd.kernel.maps import read_maps
from ckptd.kernel.mountinfo import Mount, read_mountinfo
from ckptd.kernel.namei import lstat_of_task, root_of_task
from ckptd.kernel.task import read_link

_OF_READING = IN_ACCESS | IN_OPEN | IN_CLOSE_NOWRITE     # events of the reading of a directory
MAX_MOUNTS = 16             # of one file system, which has as many as a user likes
# Types of file systems, or their beginnings, whose server may never answer, or that mount something when they are
# entered. A privileged process does not touch them for a user.
_OF_SERVERS = ('fuse', 'autofs', 'nfs', 'cifs', 'smb', '9p', 'ceph', 'afs')
MAX_ENTRIES = 50_000        # of directories, which are listed while the tree is at rest: some 50 ms

INOTIFY_LINK = 'anon_inode:inotify'
Rights = Callable[[], AbstractContextManager[None]]
Identity = tuple[int, int, FileHandle]


class WatchedFile(NamedTuple):
    """A place where a watched file is found: a path of the task's mount namespace, or an fd in the table of task `tid`
    if no path leads to the file."""
    path: str = ''
    tid: int = 0
    fd: int = -1


# ---------------------------------------------------------------- by handle

def paths_by_handle(tid: int, watches: Sequence[InotifyWatch], rights: Rights = nullcontext) -> dict[int, str]:
    """Return the paths of watched files by wd, as far as their handles tell them. Empty without CAP_DAC_READ_SEARCH.

    tid: the task whose paths they are. rights(): the block in which the paths are looked up. A path that does not lead
    to the file is left out.
    """
    root = root_of_task(tid)
    mounts = read_mountinfo(tid if root else None)
    found: dict[int, str] = {}
    for device in {watch.device for watch in watches}:
        todo = {watch.wd: watch for watch in watches if watch.device == device and watch.handle.type >= 0}
        for mount in _mounts_of(device, mounts):
            if not todo:
                break
            shown = _on_mount(mount, root, todo.values())
            with rights():
                found |= {wd: path for wd, (path, of) in shown.items()
                          if _is_same(_lstat(root + path), of) and _is_listed(root + path)}
            todo = {wd: watch for wd, watch in todo.items() if wd not in found}
    return found


def _mounts_of(device: int, mounts: Iterable[Mount]) -> list[Mount]:
    """Return mounts of a file system, those of the whole of it first: a bind mount may not show the file."""
    found = [mount for mount in mounts
             if os.makedev(mount.major, mount.minor) == device and not mount.fs_type.startswith(_OF_SERVERS)]
    return sorted(found, key=lambda mount: mount.root != '/')[:MAX_MOUNTS]


def _on_mount(mount: Mount, root: str, watches: Iterable[InotifyWatch]) -> dict[int, tuple[str, os.stat_result]]:
    """Return the paths that the kernel shows of files on a mount, and what the files are, by wd."""
    found = {}
    with ExitStack() as stack:
        try:
            directory = os.open(root + mount.mount_point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return {}       # a file is mounted there, or another mount hides it
        stack.callback(os.close, directory)
        if read_fdinfo(os.getpid(), directory).mnt_id != mount.id:
            return {}
        # EACCES: a bind mount of a directory that we may not enter
        with suppress(OSError), working_directory(directory):
            for watch in watches:
                # ESTALE, EOPNOTSUPP, EPERM: the file system does not find it, or we may not ask
                with suppress(OSError):
                    found[watch.wd] = _file_of(watch.handle)
    return found


def _file_of(handle: FileHandle) -> tuple[str, os.stat_result]:
    """Open a file on the mount of the working directory. Return its path, and what it is. OSError."""
    fd = open_handle_here(handle)
    try:
        return os.readlink(f'/proc/self/fd/{fd}'), os.fstat(fd)  # noqa: PTH115
    finally:
        os.close(fd)


def _lstat(path: str) -> os.stat_result | None:
    with suppress(OSError):
        return os.lstat(path)
    return None


def _is_listed(path: str) -> bool:
    """Whether the directory of a file may be read. The kernel shows any name of the file, and one in another directory
    is told only to those who can see it there."""
    return os.access(os.path.dirname(path) or '/', os.R_OK, effective_ids=True)  # noqa: PTH120


def _is_same(found: os.stat_result | None, of: os.stat_result) -> bool:
    return found is not None and (found.st_dev, found.st_ino) == (of.st_dev, of.st_ino)


# ---------------------------------------------------------------- among the files of the tree

class _Candidate(NamedTuple):
    """A file that may be a watched one."""
    name: str       # for inotify_add_watch(2)
    tid: int
    path: str = ''  # of the task; '' if the name is a link of /proc
    fd: int = -1

    def place(self) -> WatchedFile | None:
        """Return where a restart finds the file; None for a file without a name that no fd refers to."""
        if self.path:
            return WatchedFile(self.path)
        with suppress(OSError):
            path = os.readlink(self.name)  # noqa: PTH115
            if _is_same(lstat_of_task(self.tid, path), os.stat(self.name)):  # noqa: PTH116
                return WatchedFile(path)
        return WatchedFile('', self.tid, self.fd) if self.fd >= 0 else None


class Neighbourhood:
    """The files of a tree, and their directories, to recognize watched files among them. Each is looked at once.

    tids: a task for each fd table. Files that are open in this process count, too: they are in flight.
    """

    def __init__(self, tids: Collection[int]) -> None:
        self._tids = tids
        self._known: dict[Identity, _Candidate] = {}
        self._directories: dict[str, int] = {}      # paths, each with a task that sees it
        self._masks = 0                             # of all watches of the tree

    def find(self, watches: Sequence[InotifyWatch]) -> dict[int, WatchedFile]:
        """Return the places of watched files by wd, as far as they are found."""
        if not self._tids:
            return {}
        if not self._directories:
            self._known = _recognize(self._candidates())
        missing = [watch for watch in watches if _identity(watch) not in self._known]
        if missing:
            roots = self._mount_points({watch.device for watch in missing})
            self._known |= _recognize([*roots, *self._entries({watch.inode for watch in missing})])
        found = {}
        for watch in watches:
            candidate = self._known.get(_identity(watch))
            if candidate and (place := candidate.place()):
                found[watch.wd] = place
        return found

    def _candidates(self) -> Iterator[_Candidate]:
        """Yield the links of /proc that lead to files of the tree, then their directories."""
        paths: dict[str, int] = {'/': next(iter(self._tids))}
        for tid in self._tids:
            with suppress(OSError):     # the task is gone, or not ours to look at
                for fd in self._fds(tid):
                    yield _Candidate(f'/proc/{tid}/fd/{fd}', tid, fd=fd)
                    paths[read_link(tid, f'fd/{fd}')] = tid
                for name in ('cwd', 'root', 'exe'):
                    yield _Candidate(f'/proc/{tid}/{name}', tid)
                    paths[read_link(tid, name)] = tid
                    if name == 'cwd':
                        self._directories[read_link(tid, name)] = tid
                for path in {mapping.path for mapping in read_maps(tid) if mapping.path.startswith('/')}:
                    yield _Candidate(root_of_task(tid) + path, tid, path)
                    paths[path] = tid
        for path, tid in paths.items():
            if path.startswith('/'):
                self._directories |= {str(parent): tid for parent in PurePath(path).parents}
        for path, tid in self._directories.items():
            yield _Candidate(root_of_task(tid) + path, tid, path)

    def _fds(self, tid: int) -> list[int]:
        """List the fds of a task, and note what its inotify instances report."""
        fds = list_fds(tid)
        for fd in fds:
            with suppress(FileNotFoundError):
                if read_link(tid, f'fd/{fd}') == INOTIFY_LINK:
                    for watch in watches_of(read_fdinfo(tid, fd)):
                        self._masks |= watch.mask
        return fds

    def _mount_points(self, devices: Collection[int]) -> Iterator[_Candidate]:
        """Yield the mount points of these file systems."""
        tid = next(iter(self._tids))
        root = root_of_task(tid)
        for mount in read_mountinfo(tid if root else None):
            if os.makedev(mount.major, mount.minor) in devices:
                yield _Candidate(root + mount.mount_point, tid, mount.mount_point)

    def _entries(self, inodes: Collection[int]) -> Iterator[_Candidate]:
        """Yield the entries of the directories that have one of these inode numbers."""
        self._fds(os.getpid())
        if self._masks & _OF_READING:
            return
        left = MAX_ENTRIES
        for directory, tid in self._directories.items():
            with suppress(OSError), os.scandir(root_of_task(tid) + directory) as entries:
                for entry in entries:
                    left -= 1
                    if not left:
                        return
                    if entry.inode() in inodes:
                        yield _Candidate(entry.path, tid, str(PurePath(directory, entry.name)))


def _recognize(candidates: Iterable[_Candidate]) -> dict[Identity, _Candidate]:
    """Return the candidates by their inodes, as the kernel identifies them for inotify. Of several names of one inode,
    the first is returned."""
    by_wd: dict[int, _Candidate] = {}
    try:
        ours = Inotify()
    except OSError:
        return {}       # EMFILE: the user has too many instances
    with ours:
        for candidate in candidates:
            follow = IN_DONT_FOLLOW if candidate.path else 0
            with suppress(OSError):     # it is gone, may not be read, or the user has too many watches (ENOSPC)
                wd = inotify_add_watch(ours.fd, os.fsencode(candidate.name), IN_ISDIR | follow)
                by_wd.setdefault(wd, candidate)
        return {_identity(watch): by_wd[watch.wd] for watch in watches_of(read_fdinfo(os.getpid(), ours.fd))}


def _identity(watch: InotifyWatch) -> Identity:
    return watch.device, watch.inode, watch.handle

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kind of open file is, and the open file that it is asked about.

A kind is one class in one file of this package, found by registry.py; nobody else names it. Its hooks in life
order, each without any effect on the task:

    matches(file)       is this open file of my kind? At most one kind says yes
    refusals(file)      why it cannot be dumped, or what its dump will lack
    endpoint(file)      what joins it to other open files, of a pipe its two ends
    dump(file, content) the record that is kept, its bulk bytes given to `content`

and of a restart, where `saved` is what every kind has in common of the file (image.records.OpenFile):

    obstacles(record, saved, looking)    why it cannot be opened again, or what it will lack; changes nothing
    takes(record, saved)                 memory and other room that is needed to make it again
    late(record, saved)                  whether it can be opened only when the tasks exist
    restore(record, saved, ctx)          a new description: an fd with the access mode and flags of `saved.flags`
    finish(record, saved, fd, ctx)       what needs the tasks, or the other files: locks, what an epoll watches
    commit(record, saved, fd, ctx)       what cannot be undone, done when nothing else can fail
"""

import errno
import fcntl
import os
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, get_args, get_origin

from ckptd.errors import Finding, Severity
from ckptd.image.grammar import Struct
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel.fdinfo import FdInfo, read_fdinfo
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.pidfd import PIDFD_THREAD, pidfd_getfd, pidfd_open
from ckptd.kernel.statfs import file_system
from ckptd.kernel.task import read_link
from ckptd.objects.files.restoring import ByUser, ChangedFiles, FileLookup, RestoreContext

# for kinds, which have all that is common from here
__all__ = ['ByUser', 'ChangedFiles', 'FileLookup', 'RestoreContext']

R = TypeVar('R', bound=Struct)

DELETED = ' (deleted)'

# <asm-generic/fcntl.h>; the struct is f_owner_ex {int type; pid_t pid;}
F_GETSIG = 11
F_GETOWN_EX = 16
F_GETOWNER_UIDS = 17        # uid_t[2], with CONFIG_CHECKPOINT_RESTORE
_OWNER = struct.Struct('=ii')
_UIDS = struct.Struct('=II')

_OF_PROCESS = re.compile(r'/proc/(\d{1,10})(?:/|$)')
_TMPFILE = os.O_TMPFILE & ~os.O_DIRECTORY
# fcntl(2), F_GETFL; 0o100000 is O_LARGEFILE of the kernel, which is 0 in C libraries for 64 bit
_OF_OPEN_FILES = (os.O_ACCMODE | os.O_APPEND | os.O_ASYNC | os.O_DIRECT | os.O_DIRECTORY | os.O_NOATIME | os.O_NOFOLLOW
                  | os.O_NONBLOCK | os.O_PATH | os.O_SYNC | 0o100000)
# what open(2) of a magic link stumbles over: it is a link; and O_ASYNC comes by F_SETFL only, open(2)
_NOT_AGAIN = os.O_NOFOLLOW | os.O_ASYNC | os.O_CREAT | os.O_EXCL | os.O_TRUNC


class Content(Protocol):
    """Where bulk bytes go: a page-aligned stretch of the image's data file."""

    def add(self, chunks: Iterable[bytes]) -> Extent: ...


def open_again(fd: int, flags: int) -> int:
    """A further description of an open file, proc_pid_fd(5): of a pipe, FIFO, memfd or deleted file, too. A terminal
    does not become the controlling one of a worker, which is a session leader."""
    return os.open(f'/proc/self/fd/{fd}', opening(flags) & ~_NOT_AGAIN | os.O_CLOEXEC | os.O_NOCTTY)


def opening(flags: int) -> int:
    """Flags of an open file as open(2) takes them to open an existing one: O_TMPFILE, which stays on, makes a file, and
    flags that no open file has are not the image's to give."""
    return flags & _OF_OPEN_FILES & ~(os.O_TMPFILE if flags & _TMPFILE else 0)


def of_process(path: str) -> bool:
    """/proc/PID or below it: there once the process is."""
    found = _OF_PROCESS.match(path)
    return found is not None and int(found[1]) > 0


def access_of(flags: int) -> int:
    """os.R_OK and os.W_OK for an access mode."""
    return {os.O_RDONLY: os.R_OK, os.O_WRONLY: os.W_OK}.get(flags & os.O_ACCMODE, os.R_OK | os.W_OK)


def finding(errno: str, reason: str, hint: str, severity: Severity = 'refusal') -> Finding:
    """A finding about an open file. Whoever asked the kind adds the task and the fd. errno: a name, 'EOPNOTSUPP'."""
    return Finding(0, '', '', errno, reason, hint, severity)


class Needs(NamedTuple):
    """What it takes to make a file again. key: equal for all descriptions of the file, which is made once. Bytes:
    memory, that is filled; pipe, the capacity of one; disk, on the file system of the directory that a deleted file
    `path` is made in."""
    key: Hashable
    memory: int = 0
    pipe: int = 0
    disk: int = 0
    path: str = ''


class Endpoint(NamedTuple):
    """One end of something that has several. key: equal for all ends of one object. holds: the ends that this open file
    is ('read', 'write'); lacks: the ends that somebody has open and this file is not."""
    key: tuple[str, int, int]
    holds: frozenset[str]
    lacks: frozenset[str]


class Owner(NamedTuple):
    """fcntl(2) F_GETOWN_EX and F_GETSIG. type: F_OWNER_TID 0, PID 1, PGRP 2; pid: as the daemon sees it, 0 for none.
    uid, euid: of who set it, by whose rights the signal is sent; 0 where the kernel does not tell."""
    type: int
    pid: int
    signal: int
    uid: int
    euid: int


@dataclass(frozen=True)
class OpenFile:
    """An open file description, known by one fd of one task. tid: the thread whose table has the fd, mostly the leader.

    link: what /proc/PID/fd/FD shows. stat: of the file itself. holders: further (pid, fd) of the same description.
    severed: a connection that does not outlive the dump, of whoever asked for it to the bus. unread: open for writing
    alone, and whoever asked may not read the file, so that nothing of its content may get into the image.
    """
    pid: int
    tid: int
    fd: int
    link: str
    stat: os.stat_result
    info: FdInfo
    holders: tuple[tuple[int, int], ...] = ()
    severed: bool = False
    unread: bool = False

    @property
    def proc_path(self) -> str:
        """A magic link: stat(2) and open(2) follow it to the file itself, wherever its name is."""
        return f'/proc/{self.tid}/fd/{self.fd}'

    @cached_property
    def magic(self) -> int:
        """The file system's number, statfs(2) f_type."""
        return file_system(self.proc_path)

    @property
    def flags(self) -> int:
        """O_* of the description; O_CLOEXEC is of this fd."""
        return self.info.flags

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    @property
    def is_path(self) -> bool:
        """Opened with O_PATH: a name and no file."""
        return bool(self.flags & os.O_PATH)

    @cached_property
    def deleted(self) -> bool:
        """The name it was opened by is gone. A file may really be named 'x (deleted)': then that name finds it."""
        return self.link.endswith(DELETED) and not self._is_at(self.link)

    @property
    def path(self) -> str:
        """The name it was opened by, as seen from the root of its mount namespace."""
        return self.link.removesuffix(DELETED) if self.deleted else self.link

    @cached_property
    def reachable(self) -> bool:
        """The same file is found by its path: no other one has taken its name and no mount covers it."""
        return self._is_at(self.path)

    def _is_at(self, path: str) -> bool:
        found = lstat_of_task(self.tid, path)
        return found is not None and (found.st_dev, found.st_ino) == (self.stat.st_dev, self.stat.st_ino)

    @contextmanager
    def duplicate(self) -> Iterator[int]:
        """An fd of the same description. Its position and status flags are the task's: read with pread(2) only.

        FileNotFoundError if the task, running, has closed it since.
        """
        pidfd = pidfd_open(self.tid, PIDFD_THREAD if self.tid != self.pid else 0)
        try:
            fd = pidfd_getfd(pidfd, self.fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise FileNotFoundError(errno.ENOENT, 'closed', self.proc_path) from None
        finally:
            os.close(pidfd)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def reopen(self, flags: int) -> Iterator[int]:
        """A description of our own of the same file, deleted or not. Fails as open(2) where the mode forbids it."""
        fd = os.open(self.proc_path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            yield fd
        finally:
            os.close(fd)

    def owner(self) -> Owner:
        """Who gets SIGIO. Zeros for an O_PATH file, which has no such thing."""
        if self.is_path:
            return Owner(0, 0, 0, 0, 0)
        with self.duplicate() as fd:
            kind, pid = _OWNER.unpack(fcntl.fcntl(fd, F_GETOWN_EX, _OWNER.pack(0, 0)))
            return Owner(kind, pid, fcntl.fcntl(fd, F_GETSIG), *_owner_uids(fd))


def _owner_uids(fd: int) -> tuple[int, int]:
    try:
        uid, euid = _UIDS.unpack(fcntl.fcntl(fd, F_GETOWNER_UIDS, _UIDS.pack(0, 0)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0, 0
    return uid, euid


def read_open_file(pid: int, fd: int, tid: int | None = None, holders: tuple[tuple[int, int], ...] = ()) -> OpenFile:
    """ProcessLookupError when the task is gone, FileNotFoundError when the fd is, PermissionError without access."""
    tid = pid if tid is None else tid
    link = read_link(tid, f'fd/{fd}')
    return OpenFile(pid, tid, fd, link, os.stat(f'/proc/{tid}/fd/{fd}'), read_fdinfo(tid, fd), holders)  # noqa: PTH116


class Kind(ABC, Generic[R]):
    """One kind of open file: `class PipeKind(Kind[Pipe], tag='pipe')`. R is the record that dump() makes.

    tag: the kind's name in images, for ever. record: R, to decode what dump() gave.
    """
    tag: ClassVar[str]
    record: ClassVar[type[Struct]]

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.tag = tag
        cls.record = next(get_args(base)[0] for base in cls.__orig_bases__  # type: ignore[attr-defined]
                          if get_origin(base) is Kind)

    @abstractmethod
    def matches(self, file: OpenFile) -> bool: ...

    def refusals(self, file: OpenFile) -> list[Finding]:
        return []

    def endpoint(self, file: OpenFile) -> Endpoint | None:
        return None

    @abstractmethod
    def dump(self, file: OpenFile, content: Content) -> R: ...

    def obstacles(self, record: R, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        return []

    def takes(self, record: R, saved: SavedFile) -> Needs | None:
        return None

    def late(self, record: R, saved: SavedFile) -> bool:
        return False

    @abstractmethod
    def restore(self, record: R, saved: SavedFile, ctx: RestoreContext) -> int: ...

    def finish(self, record: R, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        return

    def commit(self, record: R, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        return

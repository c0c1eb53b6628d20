# SPDX-License-Identifier: LGPL-2.1-or-later
"""An open file of a task, the argument of kinds."""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ckptd.kernel.families import duplicate_socket
from ckptd.kernel.fdinfo import FdInfo, read_fdinfo
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.pidfd import PIDFD_THREAD, pidfd_getfd, pidfd_open
from ckptd.kernel.statfs import file_system
from ckptd.kernel.task import read_link

DELETED = ' (deleted)'

# <asm-generic/fcntl.h>; the struct is f_owner_ex {int type; pid_t pid;}
F_GETSIG = 11
F_GETOWN_EX = 16
F_GETOWNER_UIDS = 17        # uid_t[2], with CONFIG_CHECKPOINT_RESTORE
F_GET_RW_HINT = 1035        # <linux/fcntl.h>, u64
_OWNER = struct.Struct('=ii')
_UIDS = struct.Struct('=II')


class Owner(NamedTuple):
    """The owner of a file's signals: fcntl(2) F_GETOWN_EX and F_GETSIG; and F_GET_RW_HINT."""
    type: int    # F_OWNER_TID 0, PID 1, PGRP 2
    pid: int     # as the daemon sees it, 0 for none
    signal: int
    uid: int     # of the user who set it, with whose rights the signal is sent; 0 where the kernel does not report it
    euid: int    # likewise
    write_hint: int     # RWH_* for the inode, 0 for none


@dataclass(frozen=True)
class OpenFile:
    """An open file description, known by one fd of one task."""
    pid: int
    tid: int                                     # the thread whose table has the fd, mostly the leader
    fd: int
    link: str                                    # link of /proc/PID/fd/FD
    stat: os.stat_result                         # of the file itself
    info: FdInfo
    holders: tuple[tuple[int, int], ...] = ()    # further (pid, fd) of the same description
    severed: bool = False                        # the caller's own connection to the bus, which does not outlive the
                                                 # dump
    unread: bool = False                         # open for writing only, and the caller may not read the file, so its
                                                 # content must not get into the image

    @property
    def proc_path(self) -> str:
        """A magic link: stat(2) and open(2) follow it to the file itself, wherever its name is."""
        return f'/proc/{self.tid}/fd/{self.fd}'

    @cached_property
    def magic(self) -> int:
        """Number of the file system (statfs(2), f_type)."""
        return file_system(self.proc_path)

    @property
    def flags(self) -> int:
        """O_* of the description; O_CLOEXEC is that of this fd."""
        return self.info.flags

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)

    @property
    def is_path(self) -> bool:
        """Whether it was opened with O_PATH, as a name without a file."""
        return bool(self.flags & os.O_PATH)

    @cached_property
    def deleted(self) -> bool:
        """Whether the name is gone by which it was opened. A file may really be named 'x (deleted)': then that name
        finds it."""
        return self.link.endswith(DELETED) and not self._is_at(self.link)

    @property
    def path(self) -> str:
        """Name by which it was opened, from the root of its mount namespace."""
        return self.link.removesuffix(DELETED) if self.deleted else self.link

    @cached_property
    def reachable(self) -> bool:
        """Whether the path still leads to this file: no other file has taken the name, and no mount hides it."""
        return self._is_at(self.path)

    def _is_at(self, path: str) -> bool:
        found = lstat_of_task(self.tid, path)
        return found is not None and (found.st_dev, found.st_ino) == (self.stat.st_dev, self.stat.st_ino)

    @contextmanager
    def duplicate(self) -> Iterator[int]:
        """Return an fd of the same description. Its position and status flags are the task's, so read with pread(2)
        only.

        FileNotFoundError if the running task has closed it since.
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
    def as_socket(self) -> Iterator[socket.socket]:
        """Provide the task's socket itself, which may only be asked questions."""
        with self.duplicate() as fd, duplicate_socket(fd) as sock:
            yield sock

    @contextmanager
    def reopen(self, flags: int) -> Iterator[int]:
        """Open a description of our own of the same file, deleted or not. Fails like open(2) if the mode forbids it."""
        fd = os.open(self.proc_path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            yield fd
        finally:
            os.close(fd)

    def owner(self) -> Owner:
        """Return the owner for SIGIO. Zeros for an O_PATH file, which has none."""
        if self.is_path:
            return Owner(0, 0, 0, 0, 0, 0)
        with self.duplicate() as fd:
            kind, pid = _OWNER.unpack(fcntl.fcntl(fd, F_GETOWN_EX, _OWNER.pack(0, 0)))
            return Owner(kind, pid, fcntl.fcntl(fd, F_GETSIG), *_owner_uids(fd), _write_hint(fd))


def _owner_uids(fd: int) -> tuple[int, int]:
    try:
        uid, euid = _UIDS.unpack(fcntl.fcntl(fd, F_GETOWNER_UIDS, _UIDS.pack(0, 0)))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0, 0
    return uid, euid


def _write_hint(fd: int) -> int:
    try:
        return int.from_bytes(fcntl.fcntl(fd, F_GET_RW_HINT, bytes(8)), 'little')
    except OSError as error:
        if error.errno != errno.EINVAL:     # before Linux 4.13
            raise
        return 0


def read_open_file(pid: int, fd: int, tid: int | None = None, holders: tuple[tuple[int, int], ...] = ()) -> OpenFile:
    """Read an open file. ProcessLookupError when the task is gone, FileNotFoundError when the fd is, PermissionError
    without access."""
    tid = pid if tid is None else tid
    link = read_link(tid, f'fd/{fd}')
    return OpenFile(pid, tid, fd, link, os.stat(f'/proc/{tid}/fd/{fd}'), read_fdinfo(tid, fd), holders)  # noqa: PTH116

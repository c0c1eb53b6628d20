# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a path of an image may lead to in /proc, checked on what was opened, whose path cannot change any more.

A process may look at itself whatever its rights are (kernel/ptrace.c, __ptrace_may_access): /proc/self, and every
symbolic link that leads there, would give a tree the worker's own memory map. So of /proc a tree gets

    files of a process of the tree
    files of another process, where the path names it by its number: as a program of the user's may open them, by the
    user's rights, then and now
    files of no process, /proc/cpuinfo or /proc/sys: where their mode lets the user

and never what is the worker's. Links of the kernel's own on the way, /proc/PID/fd/N or cwd, are not followed at all
(ckptd.kernel.namei.open_plain): what /proc shows of an open file is a path without them.
"""

import errno
import fcntl
import os
from collections.abc import Mapping

from ckptd.kernel.fdinfo import read_fdinfo
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.namei import open_plain
from ckptd.kernel.statfs import PROC_SUPER_MAGIC, file_system
from ckptd.kernel.task import task_exists
from ckptd.objects.files.base import access_of
from ckptd.restore.file_rights import FileRights

_PROC = '/proc'


class OutOfReach(PermissionError):
    """A path leads where no tree of an image gets anything. reason: for people."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(errno.EACCES, f'{os.strerror(errno.EACCES)}: {reason}', path)
        self.reason = reason


def open_within_reach(path: str, flags: int, mode: int = 0) -> int:
    """open(2) by the rights that this thread has, past no link of the kernel's own. OutOfReach."""
    try:
        return open_plain(path, flags, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OutOfReach(path, 'it leads through too many symbolic links, or through one that /proc makes up') from None


def require_reach(fd: int, path: str, rights: FileRights, pids: Mapping[int, int]) -> None:
    """OutOfReach where the path has led to a file of /proc that the tree does not get. pids: processes of the restored
    tree as we see them, by vpid."""
    if file_system(f'{_PROC}/self/fd/{fd}') != PROC_SUPER_MAGIC:
        return
    first = _inside(fd, path).split('/')[1]
    if first.isdecimal():
        _require_process(int(first), os.fstat(fd).st_dev, path, pids)
    elif rights.uid != os.geteuid():
        _require_mode(fd, path, rights)


def _inside(fd: int, path: str) -> str:
    """The path of an open file from the root of its procfs, '/123/maps'."""
    [number] = read_fdinfo(os.getpid(), fd).fields['mnt_id']
    mount = next((mount for mount in read_mountinfo() if mount.id == int(number)), None)
    if mount is None:
        raise OutOfReach(path, 'it leads to a /proc that is not mounted any more')
    link = os.readlink(f'{_PROC}/self/fd/{fd}')  # noqa: PTH115
    return f'{mount.root.rstrip("/")}/{link[len(mount.mount_point):].lstrip("/")}'


def _require_process(number: int, device: int, path: str, pids: Mapping[int, int]) -> None:
    # another mount of procfs may be of another pid namespace, and its numbers are other processes there
    if device != os.stat(_PROC).st_dev:  # noqa: PTH116
        raise OutOfReach(path, 'it leads to a process of another mount of /proc')
    if task_exists(os.getpid(), number):
        raise OutOfReach(path, 'it leads to the process of ckptd itself')
    if pids.get(number, number) != number:
        raise OutOfReach(path, f'process {number} of the tree has another number here')
    if not f'{path}/'.startswith(f'{_PROC}/{number}/'):
        raise OutOfReach(path, f'it leads to process {number} by another name')


def _require_mode(fd: int, path: str, rights: FileRights) -> None:
    """The kernel decides about /proc/sys by the effective uid and not by that of the file system
    (fs/proc/proc_sysctl.c, test_perm)."""
    flags, of = fcntl.fcntl(fd, fcntl.F_GETFL), os.fstat(fd)
    shift = 6 if of.st_uid == rights.uid else 3 if of.st_gid in (rights.gid, *rights.groups) else 0
    if not flags & os.O_PATH and access_of(flags) & ~(of.st_mode >> shift):
        raise OutOfReach(path, 'its mode does not allow that')

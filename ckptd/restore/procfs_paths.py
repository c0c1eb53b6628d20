# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits on files of /proc that a path of an image may open. They are checked on the opened file, whose path cannot
change any more.

A process may inspect itself whatever its rights are (kernel/ptrace.c, __ptrace_may_access). So /proc/self, and every
symbolic link that leads there, would give a tree the worker's own memory map. A tree may have only

    files of a process of the tree
    files of another process, if the path has its pid: as a program of the user may open them, with the user's rights
    files of no process, such as /proc/cpuinfo or /proc/sys: if their mode allows it to the user

and never a file about the worker. Magic links on the way (/proc/PID/fd/N or cwd) are not followed at all
(ckptd.kernel.namei.open_plain): the path that /proc shows of an open file has none.
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
    """A path leads to a file that a tree of an image must not have. reason: for people."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(errno.EACCES, f'{os.strerror(errno.EACCES)}: {reason}', path)
        self.reason = reason


def open_within_reach(path: str, flags: int, mode: int = 0) -> int:
    """Open a file with the rights of this thread and without magic links, as open(2) does. OutOfReach."""
    try:
        return open_plain(path, flags, mode)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OutOfReach(path, 'it leads through too many symbolic links, or through a magic link of /proc') from None


def require_reach(fd: int, path: str, rights: FileRights, pids: Mapping[int, int]) -> None:
    """Check that the path has not led to a file of /proc that the tree must not have. OutOfReach. pids: processes of
    the restored tree as we see them, by vpid."""
    if file_system(f'{_PROC}/self/fd/{fd}') != PROC_SUPER_MAGIC:
        return
    first = _inside(fd, path).split('/')[1]
    if first.isdecimal():
        _require_process(int(first), os.fstat(fd).st_dev, path, pids)
    elif rights.uid != os.geteuid():
        _require_mode(fd, path, rights)


def _inside(fd: int, path: str) -> str:
    """Return the path of an open file from the root of its procfs, such as '/123/maps'."""
    [number] = read_fdinfo(os.getpid(), fd).fields['mnt_id']
    mount = next((mount for mount in read_mountinfo() if mount.id == int(number)), None)
    if mount is None:
        raise OutOfReach(path, 'it leads to a /proc that is no longer mounted')
    link = os.readlink(f'{_PROC}/self/fd/{fd}')  # noqa: PTH115
    return f'{mount.root.rstrip("/")}/{link[len(mount.mount_point):].lstrip("/")}'


def _require_process(number: int, device: int, path: str, pids: Mapping[int, int]) -> None:
    # another mount of procfs may be of another pid namespace, where pids mean other processes
    if device != os.stat(_PROC).st_dev:  # noqa: PTH116
        raise OutOfReach(path, 'it leads to a process of another mount of /proc')
    if task_exists(os.getpid(), number):
        raise OutOfReach(path, 'it leads to the process of ckptd itself')
    if pids.get(number, number) != number:
        raise OutOfReach(path, f'process {number} of the tree has another pid here')
    if not f'{path}/'.startswith(f'{_PROC}/{number}/'):
        raise OutOfReach(path, f'it leads to process {number} by another name')


def _require_mode(fd: int, path: str, rights: FileRights) -> None:
    """Check the mode of a file. For /proc/sys the kernel uses the effective uid and not that of the file system
    (fs/proc/proc_sysctl.c, test_perm)."""
    flags, of = fcntl.fcntl(fd, fcntl.F_GETFL), os.fstat(fd)
    shift = 6 if of.st_uid == rights.uid else 3 if of.st_gid in (rights.gid, *rights.groups) else 0
    if not flags & os.O_PATH and access_of(flags) & ~(of.st_mode >> shift):
        raise OutOfReach(path, 'its mode does not allow that')

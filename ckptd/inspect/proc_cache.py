# SPDX-License-Identifier: LGPL-2.1-or-later
"""A cache of /proc for the tasks of a tree: each file is read once for all users.

The contents stay true only for a tree at rest. A check of a running tree makes a cache of its own and drops it.
"""

import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import replace

from ckptd.kernel.creds import CAP_SYS_PTRACE, UserIds, file_rights
from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.maps import Mapping, read_smaps
from ckptd.kernel.status import Status, read_status
from ckptd.objects.files.base import OpenFile, read_open_file
from ckptd.objects.files.registry import Kinds
from ckptd.sysv import SysvName
from ckptd.tree import Task


class ProcCache:
    """The cache. Errors are those of the readers: ProcessLookupError for a task that is gone, PermissionError.

    severed: inodes of sockets that do not outlive the dump. caller: the user who gets the image. at_rest: the tree is
    at rest. kinds: kinds of open files for this cache.
    """

    def __init__(self, severed: Collection[int] = (), caller: UserIds | None = None, *,
                 at_rest: bool = False) -> None:
        self._severed, self._caller, self.at_rest = severed, caller, at_rest
        self.kinds = Kinds()
        self.sysv: Sequence[SysvName] = ()      # System V objects that belong to the image
        self._statuses: dict[int, Status] = {}
        self._mappings: dict[int, list[Mapping]] = {}
        self._files: dict[int, list[OpenFile]] = {}

    def status(self, task: Task) -> Status:
        if task.tid not in self._statuses:
            self._statuses[task.tid] = read_status(task.tgid, task.tid)
        return self._statuses[task.tid]

    def mappings(self, task: Task) -> list[Mapping]:
        """Return the mappings of the task's address space, with flags."""
        if task.tid not in self._mappings:
            self._mappings[task.tid] = read_smaps(task.tid)
        return self._mappings[task.tid]

    def files(self, task: Task) -> list[OpenFile]:
        """Return the files of the task's fd table, by fd. A file that is closed while the table is read is left out."""
        if task.tid not in self._files:
            self._files[task.tid] = self._read_files(task)
        return self._files[task.tid]

    def _read_files(self, task: Task) -> list[OpenFile]:
        found = []
        for fd in list_fds(task.tid):
            try:
                file = read_open_file(task.tgid, fd, task.tid)
            except FileNotFoundError:
                continue
            found.append(self._with_marks(file))
        return found

    def file_in_flight(self, fd: int) -> OpenFile:
        """Return the open file behind an fd of ours, which a kind has found in the queue of another file."""
        return self._with_marks(read_open_file(os.getpid(), fd))

    def _with_marks(self, file: OpenFile) -> OpenFile:
        if _socket(file) in self._severed:
            file = replace(file, severed=True)
        if self._caller and not may_read(file, self._caller):
            file = replace(file, unread=True)
        return file

    def forget(self, task: Task) -> None:
        """Drop everything that was read of a task, after it was dumped."""
        self._statuses.pop(task.tid, None)
        self._mappings.pop(task.tid, None)
        self._files.pop(task.tid, None)


def may_read(file: OpenFile, caller: UserIds) -> bool:
    """Whether a regular file is open for reading, or could be opened for reading by the caller. A service's log is
    opened for it before it gives up its rights, and text by others in that log does not belong to its user."""
    if not stat.S_ISREG(file.stat.st_mode) or file.readable or file.is_path:
        return True
    if caller.uid in (0, file.stat.st_uid):       # the owner may change the mode
        return True
    # the right to trace the task, which was checked, allows following the link; opening the file depends on the ids
    # only
    with file_rights(caller.uid, caller.gid, caller.groups, 1 << CAP_SYS_PTRACE):
        return os.access(file.proc_path, os.R_OK, effective_ids=True)


def _socket(file: OpenFile) -> int:
    """Return the inode of a socket (proc_pid_fd(5)), 0 for another file."""
    return file.stat.st_ino if file.link.startswith('socket:') else 0

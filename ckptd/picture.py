# SPDX-License-Identifier: LGPL-2.1-or-later
"""What /proc says of the tasks of a tree, each file read once for all that ask.

Only what a tree at rest shows stays true: a check of a running tree makes a picture of its own, and throws it away.
"""

from collections.abc import Collection
from dataclasses import replace

from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.maps import Mapping, read_smaps
from ckptd.kernel.status import Status, read_status
from ckptd.kinds.base import OpenFile, read_open_file
from ckptd.tree import Task


class Picture:
    """Errors are those of the readers: ProcessLookupError for a task that is gone, PermissionError.

    severed: inodes of sockets that do not outlive the dump.
    """

    def __init__(self, severed: Collection[int] = ()) -> None:
        self._severed = severed
        self._statuses: dict[int, Status] = {}
        self._mappings: dict[int, list[Mapping]] = {}
        self._files: dict[int, list[OpenFile]] = {}

    def status(self, task: Task) -> Status:
        if task.tid not in self._statuses:
            self._statuses[task.tid] = read_status(task.tgid, task.tid)
        return self._statuses[task.tid]

    def mappings(self, task: Task) -> list[Mapping]:
        """Of the task's address space, with flags."""
        if task.tid not in self._mappings:
            self._mappings[task.tid] = read_smaps(task.tid)
        return self._mappings[task.tid]

    def files(self, task: Task) -> list[OpenFile]:
        """Of the task's table, by fd. One that is closed while the table is read is left out."""
        if task.tid not in self._files:
            self._files[task.tid] = _read_files(task, self._severed)
        return self._files[task.tid]

    def forget(self, task: Task) -> None:
        """The task was dumped: what was read of it takes no more room."""
        self._statuses.pop(task.tid, None)
        self._mappings.pop(task.tid, None)
        self._files.pop(task.tid, None)


def _read_files(task: Task, severed: Collection[int]) -> list[OpenFile]:
    found = []
    for fd in list_fds(task.tid):
        try:
            file = read_open_file(task.tgid, fd, task.tid)
        except FileNotFoundError:
            continue
        found.append(replace(file, severed=True) if _socket(file) in severed else file)
    return found


def _socket(file: OpenFile) -> int:
    """The inode of a socket, proc_pid_fd(5), 0 for another file."""
    return file.stat.st_ino if file.link.startswith('socket:') else 0

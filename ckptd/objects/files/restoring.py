# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a restart gives to kinds: a look at this machine before it begins, and means to make files while it is at work.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol

from ckptd.image.records import Extent

ChangedFiles = Literal['refuse', 'accept', 'rollback']


class FileLookup(Protocol):
    """What a kind may look at before a restart begins. Paths are those of the image, looked up by the rights
    of the user: the caller, or who owns the image where root restores that of somebody else.

    changed_files: what to do about files that went on living. terminal: the caller gives one. by_root: root restores
    its own image of a user's tree, and root's rights do what the user's do not.
    """
    changed_files: ChangedFiles
    terminal: bool
    by_root: bool

    @property
    def uid(self) -> int:
        """The user's uid, which new files belong to."""
        ...

    def may_own(self, uid: int, gid: int) -> bool:
        """Whether the user may give a new file this owner and this group, chown(2)."""
        ...

    def capable(self, capability: int) -> bool:
        """Whether whoever asks for the restart has this capability."""
        ...

    def lstat(self, path: str) -> os.stat_result | None:
        """None where there is nothing, or nothing that the user may see."""
        ...

    def may(self, path: str, access: int) -> bool:
        """os.access(2) for the user: os.R_OK | os.W_OK ..."""
        ...

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """open(2) by the user's rights, O_CLOEXEC added; the fd is the kind's to close, or to return."""
        ...

    def pread(self, extent: Extent, length: int, offset: int) -> bytes:
        """A few bytes of an extent of the image."""
        ...


class ByUser(Protocol):
    """What has the user's rights."""

    def as_user(self) -> AbstractContextManager[object]:
        """A block in which what this thread does with files is done by the user's rights: mkfifo(2), fchown(2)."""
        ...


class RestoreContext(FileLookup, ByUser, Protocol):
    """The same while a restart is at work. It closes what `once` makes and what `create` returns, whatever happens."""
    terminal_fd: int        # of the caller's terminal, -1 without

    def keep(self, path: str, fd: int, start: int) -> None:
        """The file, open for reading, is about to be changed from byte `start` on: what it holds there now is put back
        if the restart fails after all. OSError without room for that."""
        ...

    def make_file(self, path: str, fill: Callable[[int], None]) -> None:
        """A new file with the content that `fill` gives to its fd; nobody sees it before. It is gone again if the
        restart fails. FileExistsError."""
        ...

    def open_linked(self, link: str, path: str, flags: int) -> int:
        """Open a deleted file by the name that a checkpoint gave it, and for the moment by its old name, where that is
        free: it is what /proc goes on to show. OSError."""
        ...

    def once(self, key: Hashable, make: Callable[[], int]) -> int:
        """An fd that several records share, such as a pipe: made by the first who asks, closed at the end of the
        restart. Not to be returned by `create`: open_again() of it is. The number may be another than `make` gave."""
        ...

    def copy(self, extent: Extent, fd: int, offset: int) -> None:
        """Bytes of the image into a file at `offset`, by the kernel alone."""
        ...

    def shared_memory(self, shm_id: int) -> int:
        """The fd of a shared object (image.records.SharedMemory), open for reading and writing; as of `once`."""
        ...

    def pid(self, vpid: int) -> int:
        """The restored task or group of that number, as we see it; 0 if the tree has none. From `finish` on."""
        ...

    def holders(self, file_id: int) -> Sequence[tuple[int, int]]:
        """(vpid of a process, fd) that lead to a description, one for each table that has it, from `connect` on."""
        ...

    def fd_of(self, file_id: int) -> int:
        """Our fd of another description of the image, from `connect` on."""
        ...

    def socketpair(self, kind: int, vpid: int, uid: int, gid: int, groups: Sequence[int]) -> tuple[int, int]:
        """Our fds of a socketpair(2) that a restored process has made with these ids, for a `late` kind."""
        ...

    def call(self, vpid: int, name: str, *arguments: int | bytes) -> int:
        """A system call by a restored process itself; bytes are put into its memory. Its result; OSError. From
        `connect` on."""
        ...

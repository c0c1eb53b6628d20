# SPDX-License-Identifier: LGPL-2.1-or-later
"""The interfaces for kinds in a restart: a look at this machine before it begins, and means to make files during it."""

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

from ckptd.image.records import Extent

ChangedFiles = Literal['refuse', 'accept', 'rollback']


class InheritedFiles:
    """Sockets and pipes that the caller of the restart has given in place of those of the image. fds: of the caller,
    each with the name of the peer (ckptd.external). Of several with one name, the first is for the first open file."""

    def __init__(self, fds: Iterable[tuple[str, int]] = ()) -> None:
        self._left = list(fds)
        self._taken: dict[int, int] = {}        # by file_id

    def take(self, what: str, file_id: int) -> int:
        """Return the fd for an open file of the image, -1 for none. A second call returns the same."""
        if file_id not in self._taken:
            found = next((one for one in self._left if one[0] == what), None)
            if found is None:
                return -1
            self._left.remove(found)
            self._taken[file_id] = found[1]
        return self._taken[file_id]

    @property
    def left(self) -> Sequence[str]:
        """Names of the peers whose fds no open file has taken."""
        return [what for what, _ in self._left]


class ByUser(Protocol):
    """An object that provides the user's rights."""
    by_root: bool       # root restores its own image of a user's tree, and root's rights do what the user's do not

    def as_user(self) -> AbstractContextManager[object]:
        """Do everything with files in this block with the user's rights: mkfifo(2), fchown(2)."""
        ...


class Maker(NamedTuple):
    """A restored process that makes a socket, and the ids that it has meanwhile: others read them (SO_PEERCRED)."""
    vpid: int
    uid: int
    gid: int
    groups: Sequence[int]


class FileLookup(ByUser, Protocol):
    """Access of a kind to this machine before a restart begins. Paths are those of the image. They are looked up with
    the rights of the user: the caller, or the owner of the image if root restores another user's."""
    changed_files: ChangedFiles    # treatment of files that have changed since
    terminal: bool                 # the caller gave a terminal
    detach_terminal: bool          # files of terminals outside of the tree come back hung up
    inherited: InheritedFiles      # what the caller gave for connections to the outside

    @property
    def uid(self) -> int:
        """The user's uid, which owns new files."""
        ...

    def may_own(self, uid: int, gid: int) -> bool:
        """Whether the user may give a new file this owner and this group (chown(2))."""
        ...

    def capable(self, capability: int) -> bool:
        """Whether the caller of the restart has this capability."""
        ...

    def lstat(self, path: str) -> os.stat_result | None:
        """Return lstat(2); None if there is nothing, or nothing that the user may see."""
        ...

    def may(self, path: str, access: int) -> bool:
        """Whether the user has access, as in os.access(2): os.R_OK | os.W_OK ..."""
        ...

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """Open a file with the user's rights, as open(2) does, with O_CLOEXEC. The kind closes or returns the fd."""
        ...

    def pread(self, extent: Extent, length: int, offset: int) -> bytes:
        """Read a few bytes of an extent of the image."""
        ...


class FileMaking(FileLookup, Protocol):
    """Means to open and make files during a restart, which need no task. The results of `once` are closed in any
    case."""

    def keep(self, path: str, fd: int, start: int) -> None:
        """Keep the content of a file, open for reading, that is about to be changed from byte `start` on. It is put
        back if the restart fails. OSError if there is no room."""
        ...

    def make_file(self, path: str, fill: Callable[[int], None]) -> None:
        """Make a file with the content that `fill` gives to its fd. No other process sees it before. It is removed if
        the restart fails. FileExistsError."""
        ...

    def open_linked(self, link: str, path: str, flags: int) -> int:
        """Open a deleted file by the name that a checkpoint gave it. OSError.

        If the old name is free, the file gets it during open(2): /proc continues to show this name.
        """
        ...

    def once(self, key: Hashable, make: Callable[[], int]) -> int:
        """Return an fd that several records share, such as a pipe: the first user makes it, and it is closed at the end
        of the restart. `create` must not return it but open_again() of it. Its number may differ from the result of
        `make`."""
        ...

    def bind(self, path: str, bind: Callable[[], None]) -> int:
        """Let `bind` bind a unix socket to a path with the user's rights. The file of a dead socket there is put aside,
        and comes back if the restart fails. Return an O_PATH fd of the new file. OSError: EADDRINUSE if anything else
        has the name."""
        ...

    def copy(self, extent: Extent, fd: int, offset: int) -> None:
        """Copy bytes of the image into a file at `offset`, inside the kernel."""
        ...


class RestoreContext(FileMaking, Protocol):
    """Means for kinds during a restart. It closes the results of `create` in any case."""
    terminal_fd: int        # of the caller's terminal, -1 without one

    def shared_memory(self, shm_id: int) -> int:
        """Return the fd of a shared object (image.records.SharedMemory), open for reading and writing, as `once`
        does."""
        ...

    def pid(self, vpid: int) -> int:
        """Return the pid of the restored task or group with that vpid, as we see it; 0 if the tree has none. From
        `finish` on."""
        ...

    def holders(self, file_id: int) -> Sequence[tuple[int, int]]:
        """Return (vpid of a process, fd) that refer to a description, one for each table that has it, from `connect`
        on."""
        ...

    def fd_of(self, file_id: int) -> int:
        """Return our fd of another description of the image, from `connect` on."""
        ...

    def socketpair(self, kind: int, maker: Maker) -> tuple[int, int]:
        """Return our fds of a socketpair(2) that a restored process has made with these ids, for a `late` kind."""
        ...

    def open_by(self, vpid: int, path: str, flags: int) -> int:
        """Return our fd of a file that a restored process has opened, for a `late` kind: what the path leads to depends
        on the process. OSError."""
        ...

    def listen(self, fd: int, backlog: int, maker: Maker) -> None:
        """Let a restored process call listen(2) for our socket with these ids, for a `late` kind. OSError."""
        ...

    def connect_socket(self, fd: int, address: bytes, at: int, maker: Maker) -> None:
        """Let a restored process call connect(2) for our socket with these ids, for a `late` kind. address: struct
        sockaddr_un. at: our O_PATH fd of the file of the other socket, which is connected to instead; -1 for none.
        OSError."""
        ...

    def call(self, vpid: int, name: str, *arguments: int | bytes) -> int:
        """Let a restored process make a system call; bytes are put into its memory. Return its result. OSError. From
        `connect` on."""
        ...

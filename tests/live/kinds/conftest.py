# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files of a forked child, an image that keeps its bulk bytes in memory, and a restart in the test's process."""

import ctypes
import fcntl
import os
import socket
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from ckptd.errors import CkptError
from ckptd.image.records import Extent, SavedFile
from ckptd.objects.files.base import ChangedFiles, Content, Kind, Maker, OpenFile, read_open_file
from ckptd.objects.files.content import ContentSegment
from ckptd.objects.files.registry import Kinds
from tests.lib.brood import Brood, libc

BY_TAG = Kinds().by_tag         # for what asks the record alone


def kind_of(file: OpenFile) -> Kind[Any]:
    """The kind of a file, in a job of its own."""
    return Kinds().of(file)


class Bulk:
    """A Content whose extents are read back with `read`."""

    def __init__(self) -> None:
        self.stretches: list[bytes] = []
        self.in_flight: list[int] = []
        self.known: dict[tuple[int, int], tuple[int, OpenFile]] = {}    # descriptions of the tree by task and fd

    def add(self, chunks: Iterable[bytes]) -> Extent:
        data = b''.join(chunks)
        self.stretches.append(data)
        return Extent(0, len(self.stretches) - 1, len(data))

    def shared_memory(self, file: OpenFile) -> int:
        return 0

    def written(self, file: OpenFile) -> bool:
        return file.writable

    def reads(self, file: OpenFile) -> bool:
        return not file.unread

    def save(self, file: OpenFile) -> tuple[ContentSegment, ...] | None:
        return None

    def link_back(self, file: OpenFile) -> str:
        raise CkptError(f'{file.path} gets no name here')

    def file_id(self, fd: int) -> int:
        self.in_flight.append(fd)
        return len(self.in_flight)

    def found(self, tid: int, fd: int) -> tuple[int, OpenFile] | None:
        return self.known.get((tid, fd))

    def every(self) -> Iterable[tuple[int, OpenFile]]:
        return self.known.values()

    def vpid(self, pid: int) -> int:
        return pid

    def read(self, extent: Extent) -> bytes:
        assert len(self.stretches[extent.offset]) == extent.length
        return self.stretches[extent.offset]

    def file(self, size: int, segments: Iterable[ContentSegment]) -> bytes:
        """The whole content of a file that was dumped in segments."""
        data = bytearray(size)
        for segment in segments:
            data[segment.start:segment.start + segment.extent.length] = self.read(segment.extent)
        assert len(data) == size
        return bytes(data)


@pytest.fixture
def bulk() -> Bulk:
    return Bulk()


@pytest.fixture
def opened(brood: Brood) -> Callable[[Callable[[], int]], OpenFile]:
    """opened(work): work() runs in a child and returns an fd; the file that it is, as ckptd sees it."""
    def run(work: Callable[[], int]) -> OpenFile:
        return read_open_file(*brood.ask(work))
    return run


class Restart:
    """A Restoring whose restored process is the test itself: vpid is its pid, and fds are as `place` puts them."""

    def __init__(self, bulk: Bulk, changed_files: ChangedFiles = 'refuse', terminal_fd: int = -1,
                 detach_terminal: bool = False) -> None:
        self.bulk = bulk
        self.changed_files: ChangedFiles = changed_files
        self.terminal_fd = terminal_fd
        self.terminal, self.detach_terminal, self.by_root = terminal_fd >= 0, detach_terminal, False
        self.vpid, self.uid = os.getpid(), os.geteuid()
        self.shared: dict[int, int] = {}
        self.kept: list[tuple[str, bytes, int]] = []
        self.calls: list[tuple[str, int]] = []
        self._once: dict[Hashable, int] = {}
        self._returned: list[int] = []
        self._held: dict[int, list[tuple[int, int]]] = {}

    # ------------------------------------------------------------ what a kind asks for

    def as_user(self) -> AbstractContextManager[object]:
        return nullcontext()

    def may_own(self, uid: int, gid: int) -> bool:
        return True

    def capable(self, capability: int) -> bool:
        return True

    def lstat(self, path: str) -> os.stat_result | None:
        try:
            return os.lstat(path)
        except OSError:
            return None

    def may(self, path: str, access: int) -> bool:
        return os.access(path, access, effective_ids=True)

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def pread(self, extent: Extent, length: int, offset: int) -> bytes:
        return self.bulk.read(extent)[offset:offset + length]

    def keep(self, path: str, fd: int, start: int) -> None:
        self.kept.append((path, os.pread(fd, 1 << 30, start), start))

    def make_file(self, path: str, fill: Callable[[int], None]) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fill(fd)
        os.close(fd)

    def open_linked(self, link: str, path: str, flags: int) -> int:
        return self.open(link, flags)

    def once(self, key: Hashable, make: Callable[[], int]) -> int:
        if key not in self._once:
            made = make()
            # to another number, as the engine does
            self._once[key] = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 500)
            os.close(made)
        return self._once[key]

    def copy(self, extent: Extent, fd: int, offset: int) -> None:
        data = memoryview(self.bulk.read(extent))
        while data:
            done = os.pwrite(fd, data, offset)
            data, offset = data[done:], offset + done

    def shared_memory(self, shm_id: int) -> int:
        return self.shared[shm_id]

    def pid(self, vpid: int) -> int:
        return vpid if vpid == self.vpid else 0

    def holders(self, file_id: int) -> Sequence[tuple[int, int]]:
        return self._held.get(file_id, ())

    def fd_of(self, file_id: int) -> int:
        return self._held[file_id][0][1]

    def socketpair(self, kind: int, maker: Maker) -> tuple[int, int]:
        assert maker.vpid == self.vpid
        mine, theirs = socket.socketpair(socket.AF_UNIX, kind)
        return mine.detach(), theirs.detach()

    def open_by(self, vpid: int, path: str, flags: int) -> int:
        assert vpid == self.vpid
        return os.open(path, flags | os.O_CLOEXEC)

    def call(self, vpid: int, name: str, *arguments: int | bytes) -> int:
        assert vpid == self.vpid
        self.calls.append((name, len(arguments)))
        result = getattr(libc, name)(*arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), f'{name}: {os.strerror(ctypes.get_errno())}')
        return int(result)

    # ------------------------------------------------------------ what the engine does

    def restore(self, saved: SavedFile, *, at: int | None = None) -> int:
        """A restored description, with its status flags as the engine sets them; at: the fd it has in the process."""
        record, kind = decoded(saved), BY_TAG[saved.kind]
        assert kind.late(record, saved) in (False, True)
        fd = kind.create(record, saved, self)
        if at is not None:
            os.dup2(fd, at, inheritable=False)
            os.close(fd)
            fd = at
        if saved.flags != fcntl.fcntl(fd, fcntl.F_GETFL):
            fcntl.fcntl(fd, fcntl.F_SETFL, saved.flags)
        self._returned.append(fd)
        self._held.setdefault(saved.file_id, []).append((self.vpid, fd))
        return fd

    def finish(self, saved: SavedFile, fd: int) -> None:
        BY_TAG[saved.kind].connect(decoded(saved), saved, fd, self)

    def watch(self, saved: SavedFile, fd: int) -> None:
        BY_TAG[saved.kind].watch(decoded(saved), saved, fd, self)

    def commit(self, saved: SavedFile, fd: int) -> None:
        BY_TAG[saved.kind].commit(decoded(saved), saved, fd, self)

    def whole(self, saved: SavedFile, *, at: int | None = None) -> int:
        """All of it for a file that depends on no other."""
        fd = self.restore(saved, at=at)
        self.finish(saved, fd)
        self.watch(saved, fd)
        self.commit(saved, fd)
        return fd

    def obstacles(self, saved: SavedFile) -> list[tuple[str, str, str]]:
        """(severity, errno, reason) of each."""
        return [(reason.severity, reason.errno, reason.reason)
                for reason in BY_TAG[saved.kind].restart_findings(decoded(saved), saved, self)]

    def let_go(self, fd: int) -> None:
        """The restored process closes an fd."""
        self._returned.remove(fd)
        os.close(fd)

    def close_shared(self) -> None:
        """The end of the restart."""
        while self._once:
            os.close(self._once.popitem()[1])

    def close(self) -> None:
        self.close_shared()
        while self._returned:
            os.close(self._returned.pop())


def decoded(saved: SavedFile) -> Any:
    return BY_TAG[saved.kind].record.decode(saved.data)


def saved_of(file: OpenFile, content: Content, file_id: int = 1) -> SavedFile:
    """The OpenFile record of a file, after a journey through an image."""
    kind, owner = kind_of(file), file.owner()
    made = SavedFile(file_id, kind.tag, file.flags & ~os.O_CLOEXEC, file.info.pos, file.stat.st_mode, owner.type,
                     owner.pid, owner.signal, file.link, kind.dump(file, content).encode(), owner.uid, owner.euid)
    return SavedFile.decode(made.encode())


@pytest.fixture
def restart(bulk: Bulk) -> Iterator[Callable[..., Restart]]:
    """restart(changed_files='accept', terminal_fd=3): a restart from the bulk of this test; closed after it."""
    made: list[Restart] = []

    def start(**options: Any) -> Restart:
        made.append(Restart(bulk, **options))
        return made[-1]
    yield start
    for one in made:
        one.close()

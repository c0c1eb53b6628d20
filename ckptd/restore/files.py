# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files: each description is opened once as a service fd, and passed to the tables that had it."""

import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ckptd.errors import CkptError
from ckptd.faults import fault
from ckptd.image.grammar import Struct
from ckptd.image.reader import ImageReader
from ckptd.image.records import Fd, FdTable, SavedFile
from ckptd.inspect.checks import CallerRights
from ckptd.objects.files.base import ChangedFiles, InheritedFiles, Kind, Maker
from ckptd.objects.mappings.means import MappingMeans
from ckptd.objects.mappings.registry import MappedObjects
from ckptd.objects.verify import decode
from ckptd.remote.interleave import Steps
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.restore.cgroups import Placement
from ckptd.restore.file_maker import FileMaker
from ckptd.restore.service_fds import ServiceFds
from ckptd.restore.task_files import connect_as, listen_as, make_socketpair, open_by_task, receive_in

F_SETSIG, F_SETOWN_EX = 10, 15          # <asm-generic/fcntl.h>
F_SET_RW_HINT = 1036                    # <linux/fcntl.h>
# flags that F_SETFL changes (fcntl(2)), without O_ASYNC
_STATUS_FLAGS = os.O_APPEND | os.O_DIRECT | os.O_NOATIME | os.O_NONBLOCK


class FileBuilder(FileMaker):
    """A builder that opens the files of the image through their kinds; see objects.files.base.RestoreContext.

    objects: the mapped objects, whose shared memory open files refer to.
    """

    def __init__(self, reader: ImageReader, service_fds: ServiceFds, caller: CallerRights, changed_files: ChangedFiles,
                 terminal_fd: int, inherited: InheritedFiles, place: Placement, keep_free: int, *,
                 detach_terminal: bool) -> None:
        super().__init__(reader, service_fds, caller, changed_files, terminal_fd, inherited, place, keep_free,
                         detach_terminal=detach_terminal)
        self.objects = MappedObjects(MappingMeans(reader, self, place.note))
        self._fds: dict[int, int] = {}
        self._stubs: Mapping[int, Stub] = {}
        self._holders: dict[int, list[tuple[int, int]]] = {}
        self._late: set[int] = set()
        self._armed: list[tuple[Kind[Any], Struct, SavedFile]] = []     # files that watch others
        self._mail = _mail(service_fds)

    # ------------------------------------------------------------ for kinds

    def shared_memory(self, shm_id: int) -> int:
        return self.objects.shared(shm_id)

    def pid(self, vpid: int) -> int:
        return self._pids.get(vpid, 0)

    def holders(self, file_id: int) -> Sequence[tuple[int, int]]:
        return self._holders.get(file_id, [])

    def fd_of(self, file_id: int) -> int:
        return self._fds[file_id]

    def socketpair(self, kind: int, maker: Maker) -> tuple[int, int]:
        return make_socketpair(self._stubs[maker.vpid], kind, maker)

    def listen(self, fd: int, backlog: int, maker: Maker) -> None:
        listen_as(self._stubs[maker.vpid], self._mail, fd, backlog, maker)

    def connect_socket(self, fd: int, address: bytes, at: int, maker: Maker) -> None:
        connect_as(self._stubs[maker.vpid], self._mail, fd, address, at, maker)

    def open_by(self, vpid: int, path: str, flags: int) -> int:
        return open_by_task(self._stubs[vpid], path, flags)

    def call(self, vpid: int, name: str, *arguments: int | bytes) -> int:
        return Script(self._stubs[vpid]).call_now(name, *arguments)

    # ------------------------------------------------------------ all files

    def open_all(self, *, late: bool) -> None:
        """Open the descriptions. late: those that can be opened only once the tasks exist."""
        for saved in self._reader.every(SavedFile):
            kind, record = decode(saved, self.kinds)
            if kind.late(record, saved) == late:
                self._fds[saved.file_id] = self._service_fds.add(self._open(kind, record, saved))
                self._late |= {saved.file_id} if late else set()
        if late:
            self._all_opened()

    def _all_opened(self) -> None:
        for saved in self._reader.every(SavedFile):
            kind, record = decode(saved, self.kinds)
            if type(kind).opened is not Kind.opened:
                with _opening(saved):
                    kind.opened(record, saved, self._fds[saved.file_id], self)

    def _open(self, kind: Kind[Any], record: Struct, saved: SavedFile) -> int:
        with _opening(saved):
            fd = kind.create(record, saved, self)
        try:
            _set_state(fd, saved)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def attach(self, stubs: Mapping[int, Stub], holders: Mapping[int, list[int]]) -> None:
        """Take over the stubs when the tasks exist. holders: a task of each table, by files_id, as (vpids of the
        processes)."""
        self._stubs = stubs
        self._pids = {vpid: stub.tid for vpid, stub in stubs.items()}
        for table in self._reader.every(FdTable):
            for fd in table.fds:
                for vpid in holders.get(table.files_id, [])[:1]:
                    self._holders.setdefault(fd.file_id, []).append((vpid, fd.fd))

    def install(self, stub: Stub, files_id: int) -> Steps[None]:
        """Set up the fd table of a task: its own files at their numbers, and no service fds."""
        script = Script(stub)
        for fd in self._reader.get(FdTable, files_id).fds:
            if fd.file_id not in self._late:
                script.call('dup3', self._fds[fd.file_id], fd.fd, _cloexec(fd), about=f'fd {fd.fd}')
        yield from script.run()
        for fd in self._reader.get(FdTable, files_id).fds:
            if fd.file_id in self._late:
                self._hand_over(stub, fd)

    def _hand_over(self, stub: Stub, fd: Fd) -> None:
        """Pass an fd to a stub that did not inherit it (unix(7), SCM_RIGHTS)."""
        received = receive_in(stub, self._mail, self._fds[fd.file_id])
        script = Script(stub)
        if received != fd.fd:
            script.call('dup3', received, fd.fd, _cloexec(fd))
            script.call('close', received)
        elif fd.cloexec:
            script.call('fcntl', received, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        script.do()

    def finish(self) -> None:
        """Finish what needs the tasks and all files: owners of signals, locks, files watched by an epoll."""
        watching: list[tuple[Kind[Any], Struct, SavedFile]] = []
        for saved in self._reader.every(SavedFile):
            kind, record = decode(saved, self.kinds)
            fd = self._fds[saved.file_id]
            kind.connect(record, saved, fd, self)
            if type(kind).watch is not Kind.watch:
                watching.append((kind, record, saved))
            if type(kind).arm is not Kind.arm:
                self._armed.append((kind, record, saved))
            if saved.owner_signal:
                fcntl.fcntl(fd, F_SETSIG, saved.owner_signal)
            if pid := self.pid(saved.owner):
                set_owner_of_signals(fd, saved, pid, self._caller.uid)
            self._set_write_hint(fd, saved)
            if saved.flags & os.O_ASYNC:
                self._set_async(fd, saved)
        for kind, record, saved in watching:
            kind.watch(record, saved, self._fds[saved.file_id], self)

    def commit(self) -> None:
        for saved in self._reader.every(SavedFile):
            kind, record = decode(saved, self.kinds)
            kind.commit(record, saved, self._fds[saved.file_id], self)
            fault('place-committed')

    def arm(self) -> None:
        """Begin to watch files, the last step before the tasks run. The service fds are closed before if there is
        something to watch, because a file that is closed later would cause an event."""
        if not self._armed:
            return
        with ExitStack() as stack:
            fds = []
            for _, _, saved in self._armed:
                fds.append(os.dup(self._fds[saved.file_id]))
                stack.callback(os.close, fds[-1])
            self._service_fds.close()
            for fd, (kind, record, saved) in zip(fds, self._armed, strict=True):
                kind.arm(record, saved, fd, self)

    def _set_write_hint(self, fd: int, saved: SavedFile) -> None:
        """Set the expected lifetime of written data, an advice to the device. Only the owner of a file may give it."""
        if saved.write_hint:
            with self.as_user(), suppress(OSError):
                fcntl.fcntl(fd, F_SET_RW_HINT, struct.pack('=Q', saved.write_hint))

    def _set_async(self, fd: int, saved: SavedFile) -> None:
        """Set O_ASYNC in a task that has the file: its fd number there is the si_fd of the signals (fs/fcntl.c,
        fcntl_setfl)."""
        flags = saved.flags & (_STATUS_FLAGS | os.O_ASYNC)
        for vpid, number in self.holders(saved.file_id)[:1]:
            self.call(vpid, 'fcntl', number, fcntl.F_SETFL, flags)
            return
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def set_owner_of_signals(fd: int, saved: SavedFile, pid: int, caller: int) -> None:
    """Set the receiver of SIGIO. It is set with the uids that set it originally, whose rights count (fs/fcntl.c,
    sigio_perm). For a user it is set with the user's own, whatever the image says. caller: uid of the restart's
    caller."""
    uids = (caller, caller) if caller else (saved.owner_uid, saved.owner_euid)
    others = os.geteuid() == 0 and any(uids)
    if others:
        os.setresuid(*uids, 0)
    try:
        fcntl.fcntl(fd, F_SETOWN_EX, struct.pack('=ii', saved.owner_type, pid))
    finally:
        if others:
            os.setresuid(0, 0, 0)


@contextmanager
def _opening(saved: SavedFile) -> Iterator[None]:
    """Name the file in an error of the kernel."""
    try:
        yield
    except OSError as error:
        raise CkptError(f'cannot open {saved.link}: {error.strerror}', errno=error.errno, resource=saved.link,
                        hint='see "ckptctl restore --dry-run"') from error


def _mail(service_fds: ServiceFds) -> tuple[socket.socket, int]:
    """Make a channel to send fds to stubs: our end, and theirs as a service fd."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours, service_fds.add(theirs.detach())


def _cloexec(fd: Fd) -> int:
    return os.O_CLOEXEC if fd.cloexec else 0


def _set_state(fd: int, saved: SavedFile) -> None:
    """Set position and status flags, if a kind could not pass them to open(2)."""
    if saved.flags & os.O_PATH:
        return
    if 0 < saved.position < 1 << 63:
        with suppress(OSError):     # a file without a position has 0, or the kernel's own count
            os.lseek(fd, saved.position, os.SEEK_SET)
    now = fcntl.fcntl(fd, fcntl.F_GETFL)
    if (now ^ saved.flags) & _STATUS_FLAGS:
        fcntl.fcntl(fd, fcntl.F_SETFL, saved.flags)

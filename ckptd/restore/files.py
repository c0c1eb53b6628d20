# SPDX-License-Identifier: LGPL-2.1-or-later
"""Open files: each description opened once, in the bank, and handed to the tables that had it."""

import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from ckptd.errors import CkptError, ImageDamaged
from ckptd.faults import fault
from ckptd.image.grammar import Struct
from ckptd.image.reader import ImageReader
from ckptd.image.records import Backing, Extent, Fd, FdTable, SavedFile
from ckptd.inspect.checks import CallerRights
from ckptd.kernel.copyrange import copy_with_holes
from ckptd.kernel.creds import CAP_SYS_PTRACE
from ckptd.kernel.namei import open_direct
from ckptd.kernel.shm import ShmidDs
from ckptd.objects.files.base import ChangedFiles, Kind
from ckptd.objects.files.deleted import deleted_file, whole
from ckptd.objects.files.registry import BY_TAG
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import Steps
from ckptd.remote.script import Script
from ckptd.remote.stub import Stub
from ckptd.restore.file_changes import FileChanges
from ckptd.restore.file_rights import FileRights, is_users, rights_for
from ckptd.restore.mapped_objects import MappedObjects
from ckptd.restore.procfs_paths import OutOfReach, open_within_reach, require_reach
from ckptd.restore.service_fds import ServiceFds

F_SETSIG, F_SETOWN_EX = 10, 15          # <asm-generic/fcntl.h>
F_OWNER_PGRP = 2
# what F_SETFL changes, fcntl(2), but for O_ASYNC
_STATUS_FLAGS = os.O_APPEND | os.O_DIRECT | os.O_NOATIME | os.O_NONBLOCK
_TO_THE_END = (1 << 32) - 1
_ENTER_AND_WRITE = os.W_OK | os.X_OK
# what a process shows of itself, fdinfo of a task at the deepest
_SHOWS = re.compile(r'/proc/(\d{1,10})/(?:task/\d{1,10}/)?(?:fdinfo/\d{1,10}|[a-z_]+)')


class FileAccess:
    """What kinds may look at, see objects.files.base.Looking. Paths of an image are those of our own mount namespace.

    rights: by which all of it is done, before the restart and during it alike. by_root: root's do what these do not, by
    a path without symbolic links."""

    def __init__(self, reader: ImageReader, caller: CallerRights, changed_files: ChangedFiles,
                 terminal_fd: int) -> None:
        self._reader, self._caller, self.rights = reader, caller, rights_for(reader, caller)
        self.by_root = is_users(reader, caller)
        self.changed_files, self.terminal_fd = changed_files, terminal_fd
        self.terminal = terminal_fd >= 0
        self._pids: Mapping[int, int] = {}

    @property
    def uid(self) -> int:
        return self.rights.uid

    def may_own(self, uid: int, gid: int) -> bool:
        return self.rights.may_own(uid, gid)

    def capable(self, capability: int) -> bool:
        mask = self._caller.capabilities
        # unknown: all for root, nothing for anybody else
        return bool(mask >> capability & 1) if mask >= 0 else not self._caller.uid

    def as_user(self) -> AbstractContextManager[object]:
        return self.rights.taken()

    def lstat(self, path: str) -> os.stat_result | None:
        with suppress(OSError, ValueError), self.rights.taken():
            return os.lstat(path)
        if self.by_root:
            with suppress(OSError, ValueError):
                return os.lstat(path)
        return None

    def may(self, path: str, access: int) -> bool:
        with self.rights.taken():
            # with AT_EACCESS faccessat2(2) goes by the file-system ids (fs/open.c, do_faccessat)
            if os.access(path, access, effective_ids=True):
                return True
        # nothing is made in a directory by rights that are not the user's
        return self.by_root and access & _ENTER_AND_WRITE != _ENTER_AND_WRITE and _may_directly(path, access)

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        fd = self._opened(path, flags, mode)
        try:
            require_reach(fd, path, self.rights, self._pids)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _opened(self, path: str, flags: int, mode: int) -> int:
        try:
            with self.rights.taken(needed := self._needed_for(path)):
                # what has a link in it may lead anywhere, and past every directory by these rights
                return open_direct(path, flags, mode) if needed else open_within_reach(path, flags, mode)
        except PermissionError:
            if not self.by_root:
                raise
        return open_direct(path, flags, mode)

    def out_of_reach(self, path: str) -> str:
        """Why the user's rights get nothing by a path, whatever is there; '' where nothing is against it."""
        try:
            with self.rights.taken():
                fd = open_within_reach(path, os.O_PATH)
            try:
                require_reach(fd, path, self.rights, self._pids)
            finally:
                os.close(fd)
        except OutOfReach as error:
            return error.reason
        except OSError:
            return ''       # its kind says so
        return ''

    def may_take(self, found: ShmidDs) -> bool:
        """A System V segment that is still there: what is in it is made what it was."""
        return self.by_root or self.rights.may_write(found)

    def owns(self, found: ShmidDs) -> bool:
        return self.by_root or self.rights.owns(found)

    def rights_to(self, path: str) -> FileRights:
        """Those by which a file may be read and written, for whoever has to do it again."""
        with self.rights.taken():
            own = os.access(path, os.R_OK | os.W_OK, effective_ids=True)
        return self.rights if own or not self.by_root else FileRights(os.geteuid(), os.getegid(), ())

    def _needed_for(self, path: str) -> int:
        """Capabilities to open it with, as a mask."""
        return 0

    def pread(self, extent: Extent, length: int, offset: int) -> bytes:
        data = bytearray(max(min(length, extent.length - offset), 0))
        self._reader.pread_into(memoryview(data), extent.part, extent.offset + offset)
        return bytes(data)


def _may_directly(path: str, access: int) -> bool:
    try:
        fd = open_direct(path, os.O_PATH)
    except OSError:
        return False
    try:
        return os.access(f'/proc/self/fd/{fd}', access)
    finally:
        os.close(fd)


class FileBuilder(FileAccess):
    """Opens what the image has, by its kinds; see objects.files.base.Restoring."""

    def __init__(self, reader: ImageReader, service_fds: ServiceFds, caller: CallerRights, changed_files: ChangedFiles,
                 terminal_fd: int
                 ) -> None:
        super().__init__(reader, caller, changed_files, terminal_fd)
        self._service_fds = service_fds
        self._fds: dict[int, int] = {}
        self._stubs: Mapping[int, Stub] = {}
        self._holders: dict[int, list[tuple[int, int]]] = {}
        self._late: set[int] = set()
        self._mail = _mail(service_fds)
        self.objects: MappedObjects
        self.file_changes: FileChanges

    def _needed_for(self, path: str) -> int:
        # a task of the tree gets its rights last, and is root's until then: /proc asks who opens its maps for the right
        # to trace it, proc_pid_maps(5), which its user has
        found = _SHOWS.fullmatch(path)
        return 1 << CAP_SYS_PTRACE if found and self._pids.get(int(found[1])) == int(found[1]) else 0

    # ------------------------------------------------------------ for kinds

    def once(self, key: Hashable, make: Callable[[], int]) -> int:
        return self._service_fds.once(key, make)

    def keep(self, path: str, fd: int, start: int) -> None:
        self.file_changes.keep(path, fd, start)

    def make_file(self, path: str, fill: Callable[[int], None]) -> None:
        self.file_changes.make(path, fill)

    def copy(self, extent: Extent, fd: int, offset: int) -> None:
        done = copy_with_holes(self._reader.data_fd(extent.part), extent.offset, extent.length, fd, offset)
        if done < extent.length:
            raise ImageDamaged('a data part ends before an extent does')

    def deleted(self, record: Backing) -> int:
        """A mapped file that had lost its name."""
        return deleted_file(record.path, record.device, record.inode, record.size, record.mode, whole(record.content),
                            self)

    def shared_memory(self, shm_id: int) -> int:
        return self.objects.shared(shm_id)

    def pid(self, vpid: int) -> int:
        return self._pids.get(vpid, 0)

    def holders(self, file_id: int) -> Sequence[tuple[int, int]]:
        return self._holders.get(file_id, [])

    def call(self, vpid: int, name: str, *arguments: int | bytes) -> int:
        return Script(self._stubs[vpid]).call_now(name, *arguments)

    # ------------------------------------------------------------ all files

    def open_all(self, *, late: bool) -> None:
        """Open the descriptions; late: those that can be only once the tasks exist."""
        for saved in self._reader.every(SavedFile):
            kind, record = decode(saved)
            if kind.late(record, saved) == late:
                self._fds[saved.file_id] = self._service_fds.add(self._open(kind, record, saved))
                self._late |= {saved.file_id} if late else set()

    def _open(self, kind: Kind[Any], record: Struct, saved: SavedFile) -> int:
        try:
            fd = kind.restore(record, saved, self)
        except OSError as error:
            raise CkptError(f'{saved.link} cannot be opened: {error.strerror}', errno=error.errno, resource=saved.link,
                            hint='see "ckptctl restore --dry-run"') from error
        try:
            _set_state(fd, saved)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def attach(self, stubs: Mapping[int, Stub], holders: Mapping[int, list[int]]) -> None:
        """The tasks are there. holders: a task of each table, by files_id, as (vpids of the processes)."""
        self._stubs = stubs
        self._pids = {vpid: stub.tid for vpid, stub in stubs.items()}
        for table in self._reader.every(FdTable):
            for fd in table.fds:
                for vpid in holders.get(table.files_id, [])[:1]:
                    self._holders.setdefault(fd.file_id, []).append((vpid, fd.fd))

    def install(self, stub: Stub, files_id: int) -> Steps[None]:
        """Make the table of a task: what it had at its numbers, nothing of the bank."""
        script = Script(stub)
        for fd in self._reader.get(FdTable, files_id).fds:
            if fd.file_id not in self._late:
                script.call('dup3', self._fds[fd.file_id], fd.fd, _cloexec(fd), about=f'fd {fd.fd}')
        yield from script.run()
        for fd in self._reader.get(FdTable, files_id).fds:
            if fd.file_id in self._late:
                self._hand_over(stub, fd)

    def _hand_over(self, stub: Stub, fd: Fd) -> None:
        """Give a stub an fd that it did not inherit, unix(7) SCM_RIGHTS."""
        ours, theirs = self._mail
        socket.send_fds(ours, [b'f'], [self._fds[fd.file_id]])
        batch = Batch()
        byte, iov, control = batch.buffer(8), batch.buffer(16, struct.pack('<QQ', 0, 1)), batch.buffer(24)
        header = batch.buffer(56, struct.pack('<QIxxxxQQQQi', 0, 0, 0, 1, 0, 24, 0))
        batch.pointer(iov.offset, byte)
        batch.pointer(header.offset + 16, iov)
        batch.pointer(header.offset + 32, control)
        batch.call('recvmsg', theirs, header, 0)
        [received] = struct.unpack_from('<i', stub.do(batch).data(control), 16)
        script = Script(stub)
        if received != fd.fd:
            script.call('dup3', received, fd.fd, _cloexec(fd))
            script.call('close', received)
        elif fd.cloexec:
            script.call('fcntl', received, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        script.do()

    def finish(self) -> None:
        """What needs the tasks and all files: owners of signals, locks, what an epoll watches."""
        for saved in self._reader.every(SavedFile):
            kind, record = decode(saved)
            fd = self._fds[saved.file_id]
            kind.finish(record, saved, fd, self)
            self._set_owner(fd, saved)
            if saved.flags & os.O_ASYNC:
                self._set_async(fd, saved)

    def commit(self) -> None:
        for saved in self._reader.every(SavedFile):
            kind, record = decode(saved)
            kind.commit(record, saved, self._fds[saved.file_id], self)
            fault('place-committed')

    def _set_owner(self, fd: int, saved: SavedFile) -> None:
        """Who gets SIGIO. Set by the uids that set it then, whose rights decide (fs/fcntl.c, sigio_perm); for a user by
        the user's own, whatever the image says."""
        if saved.owner_signal:
            fcntl.fcntl(fd, F_SETSIG, saved.owner_signal)
        pid = self.pid(saved.owner)
        if not pid:
            return
        uids = (self._caller.uid,) * 2 if self._caller.uid else (saved.owner_uid, saved.owner_euid)
        others = os.geteuid() == 0 and any(uids)
        if others:
            os.setresuid(*uids, 0)
        try:
            fcntl.fcntl(fd, F_SETOWN_EX, struct.pack('=ii', saved.owner_type, pid))
        finally:
            if others:
                os.setresuid(0, 0, 0)

    def _set_async(self, fd: int, saved: SavedFile) -> None:
        """O_ASYNC, by one who has the file: its number there is the si_fd of the signals (fs/fcntl.c, fcntl_setfl)."""
        flags = saved.flags & (_STATUS_FLAGS | os.O_ASYNC)
        for vpid, number in self.holders(saved.file_id)[:1]:
            self.call(vpid, 'fcntl', number, fcntl.F_SETFL, flags)
            return
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _mail(service_fds: ServiceFds) -> tuple[socket.socket, int]:
    """A way to send fds to stubs: our end, and theirs in the bank."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours, service_fds.add(theirs.detach())


def _cloexec(fd: Fd) -> int:
    return os.O_CLOEXEC if fd.cloexec else 0


def decode(saved: SavedFile) -> tuple[Kind[Any], Struct]:
    """The kind that wrote the record of an open file, and what it wrote. ImageDamaged."""
    kind = BY_TAG.get(saved.kind)
    if kind is None:
        raise ImageDamaged(f'{saved.link}: a file of kind {saved.kind!r}, which this ckptd does not know',
                           resource=saved.link, hint='use the ckptd that wrote the image, or a newer one')
    return kind, kind.record.decode(saved.data)


def _set_state(fd: int, saved: SavedFile) -> None:
    """Position and status flags, where a kind could not give them to open(2)."""
    if saved.flags & os.O_PATH:
        return
    if 0 < saved.position < 1 << 63:
        with suppress(OSError):     # what has no position has 0, or the kernel's own count
            os.lseek(fd, saved.position, os.SEEK_SET)
    now = fcntl.fcntl(fd, fcntl.F_GETFL)
    if (now ^ saved.flags) & _STATUS_FLAGS:
        fcntl.fcntl(fd, fcntl.F_SETFL, saved.flags)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A POSIX message queue (mq_overview(7)).

One with a name is outside of the tree, like a file with a name: it outlives its users, and keeps its messages. One
whose name was unlinked is made again, empty: messages can only be received, which a checkpoint cannot undo safely.
"""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import PurePath

from ckptd.errors import Busy, CkptError, Finding
from ckptd.image.grammar import U8, U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel import statfs
from ckptd.kernel.mqueue import (
    SIGEV_THREAD,
    QueueState,
    mq_create,
    mq_getattr,
    mq_open,
    mq_unlink,
    parse_state,
    sigevent,
)
from ckptd.objects.files.base import (
    DELETED,
    O_LARGEFILE,
    Content,
    FileLookup,
    Kind,
    OpenFile,
    RestoreContext,
    finding,
    opening,
)
from ckptd.objects.files.content import owner_findings, set_owner
from ckptd.objects.files.deleted import open_nameless
from ckptd.objects.files.tables import JobTables
from ckptd.objects.support import Support

_MOST = (1 << 31) - 1       # ipc/mqueue.c, HARD_MSGMAX and HARD_MSGSIZEMAX are below
_TRIES = 100


@layout
class Notification(Struct):
    """A registration of mq_notify(3). The value that comes with the signal is not known."""
    vpid: U32       # of the process that is notified
    how: U8         # SIGEV_*
    signal: U8      # 0 if it is no signal


@layout
class MessageQueue(Struct):
    """A queue. name: without a slash; the last one that it had, if it was unlinked."""
    name: str
    inode: U64
    unlinked: U8
    maxmsg: U64
    msgsize: U64
    mode: U32
    uid: U32
    gid: U32
    notifications: tuple[Notification, ...]


class MessageQueueKind(Kind[MessageQueue], tag='mqueue'):
    support = Support('POSIX message queues', dumped='name', restored='partly',
                      refused='one that was unlinked while it has messages, a notification by a thread, another IPC '
                      'namespace', warned='the value of a notification')

    def __init__(self, tables: JobTables) -> None:
        super().__init__(tables)
        self._opened: dict[tuple[int, int], int] = {}       # fds of queues, by inode and access mode

    def matches(self, file: OpenFile) -> bool:
        return not file.is_path and stat.S_ISREG(file.stat.st_mode) and file.magic == statfs.MQUEUE_MAGIC

    def findings(self, file: OpenFile) -> list[Finding]:
        if not os.path.samefile(f'/proc/{file.tid}/ns/ipc', '/proc/self/ns/ipc'):  # noqa: PTH121
            return [finding('EOPNOTSUPP', f'the message queue {_name(file)} may be of another IPC namespace than that '
                            'of ckptd', 'let the program close it before the checkpoint')]
        try:
            state = _read_state(file)
        except PermissionError:
            return [finding('EACCES', f'the message queue {_name(file)} cannot be read, so it is not known whom it '
                            'notifies', 'run ckptd as root')]
        return [*self._lost(file, state), *self._messages(file, state)]

    def _lost(self, file: OpenFile, state: QueueState) -> Iterator[Finding]:
        if not state.pid or (self._tables.tasks is not None and state.pid not in self._tables.tasks):
            return
        if state.notify == SIGEV_THREAD:
            yield finding('EOPNOTSUPP', f'process {state.pid} is notified by a thread of messages in the queue '
                          f'{_name(file)}', 'let it end the notification (mq_notify(3)) before the checkpoint')
        elif state.signal:
            yield finding('ENODATA', f'the kernel does not tell the value that comes with signal {state.signal} of the '
                          f'message queue {_name(file)}', 'after a restart it is 0', 'warning')

    def _messages(self, file: OpenFile, state: QueueState) -> Iterator[Finding]:
        with file.duplicate() as fd:
            count = mq_getattr(fd).mq_curmsgs
        if count and not file.stat.st_nlink:
            yield finding('EOPNOTSUPP', f'the message queue {_name(file)} was unlinked and has {count} messages '
                          f'({state.size} bytes), which can only be received', 'let the program receive them first, or '
                          'unlink the queue (mq_unlink(3)) when it is empty')

    def dump(self, file: OpenFile, content: Content) -> MessageQueue:
        of, state = file.stat, _read_state(file)
        with file.duplicate() as fd:
            attributes = mq_getattr(fd)
        vpid = content.vpid(state.pid) if state.pid else 0
        notifications = (Notification(vpid, state.notify, state.signal),) if vpid else ()
        return MessageQueue(_name(file), of.st_ino, int(not of.st_nlink), attributes.mq_maxmsg, attributes.mq_msgsize,
                            of.st_mode, of.st_uid, of.st_gid, notifications)

    # ------------------------------------------------------------ restart

    def restart_findings(self, record: MessageQueue, saved: SavedFile, lookup: FileLookup) -> list[Finding]:
        if record.unlinked:
            return owner_findings(f'the message queue {record.name}', record.uid, record.gid, lookup)
        try:
            fd = mq_open(record.name, opening(saved.flags) & os.O_ACCMODE)
        except FileNotFoundError:
            return [finding('ENOENT', f'the message queue {record.name} is gone', 'let its other users make it again, '
                            'and restore with --changed-files=accept')]
        except OSError as error:
            return [finding('EACCES', f'the message queue {record.name} cannot be opened: {error.strerror}',
                            'run as its owner, or as root')]
        inode = os.fstat(fd).st_ino
        os.close(fd)
        if inode == record.inode:
            return []
        if lookup.changed_files == 'accept':
            return [finding('ESTALE', f'the message queue {record.name} is another one', 'the tree uses it', 'warning')]
        return [finding('ESTALE', f'the message queue {record.name} is another one', '--changed-files=accept uses it')]

    def create(self, record: MessageQueue, saved: SavedFile, ctx: RestoreContext) -> int:
        if record.unlinked:
            base = ctx.once(('mqueue', record.inode), lambda: self._make(record, ctx))
            key = record.inode, saved.flags & (os.O_ACCMODE | O_LARGEFILE)
            return self._opened.pop(key) if key in self._opened else open_nameless(base, saved.flags, ctx)
        with ctx.as_user():
            fd = mq_open(record.name, opening(saved.flags))
        if os.fstat(fd).st_ino != record.inode and ctx.changed_files != 'accept':
            os.close(fd)
            raise CkptError(f'the message queue {record.name} is another one', resource=saved.link)
        return fd

    def _make(self, record: MessageQueue, ctx: RestoreContext) -> int:
        """Make an empty queue without a name, and open it once in each access mode while it has one: open(2) of a magic
        link sets O_LARGEFILE, which mq_open(2) does not. /proc shows the old name, if it is free."""
        names = (record.name, *(f'{record.name[:200]}.{secrets.token_hex(4)}' for _ in range(_TRIES)))
        for name in names:
            with suppress(FileExistsError):
                with ctx.as_user():
                    fd = mq_create(name, min(record.maxmsg, _MOST), min(record.msgsize, _MOST))
                    try:
                        for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
                            self._opened[record.inode, access] = mq_open(name, access)
                    finally:
                        mq_unlink(name)
                set_owner(fd, record.mode, record.uid, record.gid, ctx)
                return fd
        raise CkptError(f'the message queue {record.name} cannot be made again', resource=record.name)

    def close(self) -> None:
        while self._opened:
            os.close(self._opened.popitem()[1])

    def connect(self, record: MessageQueue, saved: SavedFile, fd: int, ctx: RestoreContext) -> None:
        """Register for notifications again. The kernel ends one when its process closes any fd of the queue."""
        for one in record.notifications:
            for number in [number for vpid, number in ctx.holders(saved.file_id) if vpid == one.vpid][:1]:
                try:
                    ctx.call(one.vpid, 'mq_notify', number, sigevent(one.how, one.signal))
                except OSError as error:
                    raise Busy(f'process {one.vpid} cannot be notified of messages in the queue {record.name} again: '
                               f'{error.strerror}', errno=error.errno, resource=saved.link,
                               hint='only one process is notified: end the other one') from error


def _name(file: OpenFile) -> str:
    link = file.link if file.stat.st_nlink else file.link.removesuffix(DELETED)
    return PurePath(link).name


def _read_state(file: OpenFile) -> QueueState:
    with file.reopen(os.O_RDONLY) as fd:
        return parse_state(os.read(fd, 256))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V message queues of our IPC namespace (msgctl(2), proc_sysvipc_msg(5))."""

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from ckptd.kernel.decl import c_int, c_long, c_size_t, c_ssize_t, c_ulong, c_void_p, cstruct, libc, s32, s64
from ckptd.kernel.ipc import (
    IPC_CREAT,
    IPC_EXCL,
    IPC_NOWAIT,
    IPC_RMID,
    IPC_SET,
    IPC_STAT,
    choose_next_id,
    ipc_perm,
)
from ckptd.kernel.procfs import read_file

MSG_COPY = 0o40000      # <linux/msg.h>, since 3.8
_TYPE = ctypes.sizeof(ctypes.c_long)        # mtype of struct msgbuf, before the text


@cstruct(size=120)
class msqid_ds(ctypes.Structure):
    """struct msqid64_ds of <asm-generic/msgbuf.h>"""
    msg_perm: ipc_perm
    msg_stime: s64
    msg_rtime: s64
    msg_ctime: s64
    msg_cbytes: c_ulong
    msg_qnum: c_ulong
    msg_qbytes: c_ulong
    msg_lspid: s32
    msg_lrpid: s32
    unused4: c_ulong
    unused5: c_ulong


@libc
def _msgctl(msqid: c_int, cmd: c_int, buf: c_void_p) -> c_int: ...


@libc
def _msgget(key: c_int, msgflg: c_int) -> c_int: ...


@libc
def _msgsnd(msqid: c_int, msgp: c_void_p, msgsz: c_size_t, msgflg: c_int) -> c_int: ...


@libc
def _msgrcv(msqid: c_int, msgp: c_void_p, msgsz: c_size_t, msgtyp: c_long, msgflg: c_int) -> c_ssize_t: ...


class SystemVQueue(NamedTuple):
    """A queue."""
    msqid: int
    key: int            # unsigned, 0 for IPC_PRIVATE
    mode: int           # permission bits
    size: int           # bytes of all messages
    messages: int
    sender: int         # pid of the last msgsnd(2), 0 for none
    receiver: int       # pid of the last msgrcv(2), 0 for none
    uid: int
    gid: int


def parse_queues(data: bytes) -> list[SystemVQueue]:
    """Parse rows of key, msqid, mode (octal), bytes, messages, lspid, lrpid, uid, gid, and more."""
    rows = (row.split() for row in data.splitlines()[1:])
    return [SystemVQueue(int(msqid), int(key) & 0xFFFFFFFF, int(mode, 8), *map(int, numbers[:6]))
            for key, msqid, mode, *numbers in rows]


def list_queues() -> list[SystemVQueue]:
    return parse_queues(read_file('/proc/sysvipc/msg'))


class QueueHead(NamedTuple):
    """A queue without its messages."""
    key: int        # unsigned, 0 for IPC_PRIVATE
    mode: int       # permission bits
    uid: int
    gid: int
    qbytes: int     # bytes that its messages may have


class SystemVMessage(NamedTuple):
    """A message."""
    type: int       # at least 1
    text: bytes


def read_queue(msqid: int) -> tuple[QueueHead, int]:
    """Return a queue, and the uid that has made it. OSError: EINVAL, EIDRM: none such; EACCES: no read permission."""
    data = msqid_ds()
    _msgctl(msqid, IPC_STAT, ctypes.byref(data))
    perm = data.msg_perm
    return QueueHead(perm.key & 0xFFFFFFFF, perm.mode & 0o777, perm.uid, perm.gid, data.msg_qbytes), perm.cuid


def copy_messages(msqid: int) -> Iterator[SystemVMessage]:
    """Yield the messages of a queue, which stay there (MSG_COPY). OSError: ENOSYS without CONFIG_CHECKPOINT_RESTORE."""
    buffer = ctypes.create_string_buffer(_TYPE + max(int(read_file('/proc/sys/kernel/msgmax')), 1))
    number = 0
    while True:
        try:
            size = _msgrcv(msqid, buffer, len(buffer) - _TYPE, number, MSG_COPY | IPC_NOWAIT)
        except OSError as error:
            if error.errno == errno.ENOMSG:
                return
            raise
        yield SystemVMessage(ctypes.c_long.from_buffer(buffer).value, buffer.raw[_TYPE:_TYPE + size])
        number += 1


def send_message(msqid: int, message: SystemVMessage) -> None:
    """Send a message, without waiting for room. OSError: EAGAIN."""
    _msgsnd(msqid, message.type.to_bytes(_TYPE, 'little') + message.text, len(message.text), IPC_NOWAIT)


def msgget_at(msqid: int, key: int) -> None:
    """Make a queue with exactly this id. EEXIST: another one has the id or the key."""
    choose_next_id('msg', msqid)
    got = _msgget(ctypes.c_int(key).value, 0o600 | IPC_CREAT | IPC_EXCL)
    if got != msqid:
        msgctl_remove(got)
        raise OSError(errno.EEXIST, f'msgget: {os.strerror(errno.EEXIST)}: id {got} instead of {msqid}')


def msgctl_set(msqid: int, uid: int, gid: int, mode: int, qbytes: int) -> None:
    """IPC_SET. OSError: EPERM for more bytes than the sysctl kernel.msgmnb without CAP_SYS_RESOURCE."""
    data = msqid_ds()
    data.msg_perm.uid, data.msg_perm.gid, data.msg_perm.mode = uid, gid, mode
    data.msg_qbytes = qbytes
    _msgctl(msqid, IPC_SET, ctypes.byref(data))


def msgctl_remove(msqid: int) -> None:
    """IPC_RMID: remove the queue at once."""
    _msgctl(msqid, IPC_RMID, None)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A System V message queue (msgget(2), msgsnd(2)) with its messages, which are read without being received (MSG_COPY).
A restart sends them again in their order; times and the pids of msgctl(2) are new."""

import errno
import os
from collections.abc import Iterator, Mapping

from ckptd.errors import Finding
from ckptd.image.grammar import U64, Struct, layout
from ckptd.kernel.creds import CAP_SYS_RESOURCE
from ckptd.kernel.msg import SystemVMessage, copy_messages, list_queues, msgctl_set, msgget_at, read_queue, send_message
from ckptd.kernel.procfs import read_file
from ckptd.objects.attributes.base import about
from ckptd.objects.ipc.base import IpcCheck, IpcPermissions, SystemVKind
from ckptd.objects.support import Support

_MAX_TYPE = (1 << 63) - 1       # long, msgsnd(2)
_MOST = 8 << 20                 # bytes of messages in an image; a queue has 16 KiB, unless root allows more


@layout
class QueuedMessage(Struct):
    """A message."""
    type: U64
    text: bytes


@layout
class QueueContent(Struct):
    """A queue."""
    permissions: IpcPermissions
    qbytes: U64                     # bytes that its messages may have
    messages: tuple[QueuedMessage, ...]


class QueuesKind(SystemVKind[QueueContent], tag='msg'):
    support = Support('System V message queues that are named (--sysv)',
                      refused='an id or key that is taken; more than 8 MiB of messages', warned='the creator',
                      user='a queue above the sysctl kernel.msgmnb is refused')
    words, remove = 'System V message queue', '-q'

    def living(self) -> Mapping[int, int]:
        return {one.msqid: one.key for one in list_queues()}

    def read(self, number: int) -> QueueContent:
        found, _ = read_queue(number)
        messages, size = [], 0
        for message in copy_messages(number):
            size += len(message.text) + 16
            if size > _MOST:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            messages.append(QueuedMessage(message.type, message.text))
        return QueueContent(IpcPermissions(found.key, found.uid, found.gid, found.mode), found.qbytes, tuple(messages))

    def flaws(self, state: QueueContent) -> Iterator[str]:
        if any(not 1 <= message.type <= _MAX_TYPE for message in state.messages):
            yield 'a message of an impossible type'

    def obstacles(self, state: QueueContent, context: IpcCheck) -> Iterator[Finding]:
        longest = max((len(message.text) for message in state.messages), default=0)
        if longest > (most := _sysctl('msgmax')):
            yield about(0, '', 'EMSGSIZE', f'it has a message of {longest:,} bytes, and {most:,} are allowed',
                        f'sysctl kernel.msgmax={longest}')
        if (needed := _room(state)) > (most := _sysctl('msgmnb')) and not context.may(CAP_SYS_RESOURCE):
            yield about(0, '', 'EPERM', f'it has room for {needed:,} bytes; more than {most:,} take CAP_SYS_RESOURCE',
                        f'restore it as root, or: sysctl kernel.msgmnb={needed}')

    def make(self, number: int, state: QueueContent) -> None:
        msgget_at(number, state.permissions.key)

    def fill(self, number: int, state: QueueContent) -> None:
        of = state.permissions
        found, _ = read_queue(number)
        if _room(state) > found.qbytes:
            msgctl_set(number, found.uid, found.gid, found.mode, _room(state))
        for message in state.messages:
            send_message(number, SystemVMessage(message.type, message.text))
        msgctl_set(number, of.uid, of.gid, of.mode, state.qbytes)


def _room(state: QueueContent) -> int:
    """Return the bytes that the queue must have room for. It may have more messages than its limit, which was lowered
    then; the kernel counts an empty message as one byte (ipc/msg.c, msg_fits_inqueue)."""
    return max(state.qbytes, sum(len(message.text) for message in state.messages), len(state.messages))


def _sysctl(name: str) -> int:
    return int(read_file(f'/proc/sys/kernel/{name}'))

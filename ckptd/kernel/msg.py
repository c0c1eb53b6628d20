# SPDX-License-Identifier: LGPL-2.1-or-later
"""System V message queues of our IPC namespace (proc_sysvipc_msg(5))."""

from typing import NamedTuple

from ckptd.kernel.procfs import read_file


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

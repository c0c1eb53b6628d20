# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pidfd, pidfd_open(2): a reference to a process or thread of the tree, or to one that is dead and reaped.

fdinfo has the number of the task while it exists, also of a zombie. A restart opens it by the task with the same number
in the tree. For a dead one it makes a process that ends with the same status, which PIDFD_GET_INFO tells.
"""

import errno
import fcntl
import os
import signal
import struct
from contextlib import suppress

from ckptd.errors import Finding, Refused
from ckptd.image.grammar import U32, U64, Struct, layout
from ckptd.image.records import SavedFile
from ckptd.kernel.creds import SUID_DUMP_DISABLE
from ckptd.kernel.decl import IOWR
from ckptd.kernel.fork import waiting_child
from ckptd.kernel.pidfd import PIDFD_NONBLOCK, PIDFD_THREAD, pidfd_open
from ckptd.kernel.prctl import PR_SET_DUMPABLE, prctl
from ckptd.kernel.stat import read_stat
from ckptd.objects.files.base import Content, Kind, OpenFile, RestoreContext, finding
from ckptd.objects.support import Support

_LINK = 'anon_inode:[pidfd]'
# <linux/pidfd.h>, since 6.15: struct pidfd_info {mask, cgroupid: u64; 11 ids: u32; exit_code: s32; ...}
_INFO = struct.Struct('=2Q11Ii')
_INFO_EXIT = 1 << 3
_GET_INFO = IOWR('\xff', 11, _INFO.size)


@layout
class Pidfd(Struct):
    """A reference to a task."""
    inode: U64      # equal for all pidfds of one task
    vpid: U32       # of the task; 0 if it is dead and reaped
    status: U32     # of a dead one: how it ended, wait(2)


class PidfdKind(Kind[Pidfd], tag='pidfd'):
    support = Support('pidfds', refused='those of processes outside of the tree',
                      warned='the exit status of a reaped process, before Linux 6.15')

    def matches(self, file: OpenFile) -> bool:
        return file.link == _LINK and not file.is_path

    def findings(self, file: OpenFile) -> list[Finding]:
        pid = _pid(file)
        if pid < 0:
            if _status(file) is not None:
                return []
            return [finding('ENODATA', f'the kernel does not tell how the process of {file.link} ended',
                            'after a restart it has ended with status 0; Linux 6.15 tells', 'warning')]
        if self._tables.tasks is not None and pid not in self._tables.tasks:
            return [finding('EOPNOTSUPP', f'a pidfd refers to {_name(pid)}, outside of the tree',
                            'close it before the checkpoint, or checkpoint a tree that has that process')]
        return []

    def dump(self, file: OpenFile, content: Content) -> Pidfd:
        pid = _pid(file)
        if pid < 0:
            return Pidfd(file.stat.st_ino, 0, _status(file) or 0)
        if not (vpid := content.vpid(pid)):
            raise Refused(f'a pidfd refers to {_name(pid)}, outside of the tree', errno=errno.EOPNOTSUPP, task=file.pid,
                          resource=f'fd {file.fd}')
        return Pidfd(file.stat.st_ino, vpid, 0)

    # ------------------------------------------------------------ restart

    def late(self, record: Pidfd, saved: SavedFile) -> bool:
        return True

    def create(self, record: Pidfd, saved: SavedFile, ctx: RestoreContext) -> int:
        flags = saved.flags & (PIDFD_NONBLOCK | PIDFD_THREAD)
        if record.vpid:
            return pidfd_open(ctx.pid(record.vpid), flags)
        # all that refer to one process share its inode; a further description of it is opened by no other way
        return os.dup(ctx.once(('pidfd', record.inode, flags), lambda: _ended(record.status, flags)))


def _pid(file: OpenFile) -> int:
    """The task of a pidfd: -1 if it is dead and reaped, 0 if it is not in our pid namespace."""
    return int(file.info.fields['Pid'][0])


def _status(file: OpenFile) -> int | None:
    """The wait status of a process that is dead and reaped; None if the kernel does not tell."""
    with file.duplicate() as fd, suppress(OSError):
        info = bytearray(_INFO.size)
        _INFO.pack_into(info, 0, _INFO_EXIT, *[0] * 13)
        fcntl.ioctl(fd, _GET_INFO, info)
        mask, *_, status = _INFO.unpack(info)
        return int(status) & 0xFFFF if mask & _INFO_EXIT else None
    return None


def _name(pid: int) -> str:
    with suppress(OSError):
        return f'{read_stat(pid).comm}[{pid}]'
    return f'process {pid}' if pid else 'a process of another pid namespace'


def _ended(status: int, flags: int) -> int:
    """A pidfd of a process that has ended with this wait status and is reaped."""
    with waiting_child(lambda: _end(status)) as child:
        return pidfd_open(child, flags)     # with PIDFD_THREAD, of its only thread


def _end(status: int) -> None:
    """End as the status says."""
    try:
        if number := status & 0x7F:
            prctl(PR_SET_DUMPABLE, SUID_DUMP_DISABLE)       # no core file
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
            os.kill(os.getpid(), number)
    finally:
        os._exit(status >> 8)

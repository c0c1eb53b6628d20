# SPDX-License-Identifier: LGPL-2.1-or-later
"""The uid of the login that a process descends from, for the audit log (proc_pid_loginuid(5)). Only a task itself may
set it, and each setting begins an audit session. So a process sets it when it is born, if it differs from that of its
maker; its descendants inherit both."""

import errno
import os
from collections.abc import Iterable

from ckptd.errors import Finding
from ckptd.image.grammar import U32, Struct, layout
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.kernel.creds import CAP_AUDIT_CONTROL
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.task import read_loginuid
from ckptd.objects.attributes.base import (
    Attribute,
    DumpedTask,
    RestartRights,
    RestoredTask,
    Scope,
    Stage,
    about,
)
from ckptd.objects.support import Support
from ckptd.remote.batch import Batch
from ckptd.remote.interleave import Steps

_UNSET = (1 << 32) - 1      # AUDIT_UID_UNSET, <linux/audit.h>
_FILE = b'proc/thread-self/loginuid\0'


@layout
class LoginUid(Struct):
    """The login. uid: _UNSET for a process without a login."""
    uid: U32


class LoginUidAttribute(Attribute[LoginUid, int], name='loginuid', scope=Scope.PROCESS, stage=Stage.BORN):
    support = Support('login uid',
                      warned='the uid, in an image of another user or an imported one',
                      user='the login uid of the user')

    def look(self, tracee: Tracee) -> int:
        return read_loginuid(tracee.tid) & _UNSET

    def dump(self, of: DumpedTask, answer: int) -> LoginUid:
        return LoginUid(answer)

    def obstacles(self, record: LoginUid, task: ImageTask, rights: RestartRights) -> Iterable[Finding]:
        own = read_loginuid(os.getpid()) & _UNSET
        may = _is_trusted(rights.reader) and not rights.in_user_namespace and (
            own == _UNSET or rights.allowed.may(CAP_AUDIT_CONTROL))
        if record.uid != own and not may:
            yield _lost(task.vpid, record.uid, own)

    def restore(self, record: LoginUid, to: RestoredTask) -> Steps[None] | None:
        if not (_is_trusted(to.means.reader) and to.means.sets_ids) or read_loginuid(to.tid) & _UNSET == record.uid:
            return None
        return _set(record, to)


def _set(record: LoginUid, to: RestoredTask) -> Steps[None]:
    opening, writing, value = Batch(), Batch(), str(record.uid).encode()
    opening.call('openat', to.means.directory('/'), opening.buffer(len(_FILE), _FILE), os.O_WRONLY | os.O_CLOEXEC, 0)
    try:
        fd = (yield from to.stub.run(opening)).value(0)
        write = writing.call('write', fd, writing.buffer(len(value), value), len(value))
        writing.call('close', fd)
        (yield from to.stub.attempt(writing)).value(write)
    except OSError as error:
        # EPERM: the audit rules forbid changes (auditctl --loginuid-immutable)
        if error.errno not in (errno.EPERM, errno.EACCES):
            raise
        to.means.warn(_lost(to.vpid, record.uid, read_loginuid(to.tid) & _UNSET))


def _is_trusted(reader: ImageReader) -> bool:
    """Whether the audit log may trust the image: the worker's user has written it. Otherwise root would write data that
    a user has made up into the log."""
    return not reader.manifest.imported and reader.manifest.owner_uid == os.geteuid()


def _lost(vpid: int, wanted: int, found: int) -> Finding:
    name = {_UNSET: 'no login'}
    return about(vpid, 'loginuid', 'EPERM', f'belonged to {name.get(wanted, f"the login of uid {wanted}")} for the '
                 f'audit log, and comes back with {name.get(found, f"that of uid {found}")}', 'restore it in a session '
                 'of that login, or as root an image of root', 'warning')

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The error tree. Each class owns its D-Bus name, errno, exit status and hint, so no program has to parse a message.

On the bus a CkptError is an error message named ``org.ckptd1.Error.<name>`` with body ``sa{sv}``: one sentence, then
`CkptError.details()`. As JSON (``ckptctl --json``) it is ``{"error": {"name": ..., "message": ..., **details}}``.

Exit statuses of ckptctl: 0 done, 1 failed, 2 usage, 3 refused, 4 not permitted, 5 no such thing, 6 image damaged, 69 no
daemon (EX_UNAVAILABLE), 75 try again (EX_TEMPFAIL), 124 deadline passed, 130 cancelled.
"""

import errno as _errno
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

ERROR_PREFIX = 'org.ckptd1.Error.'
NAMESPACE = 'namespace '        # begin of Finding.resource for a namespace
SECCOMP = 'seccomp'             # Finding.resource: a worker outside of the daemon's sandbox may be able to


def errno_name(number: int) -> str:
    """Return 'EPERM' for 1, and the number itself for an errno without a name."""
    return _errno.errorcode.get(number, str(number))


# unrestorable: a warning while the tree goes on, as no restart can bring it back; a refusal where it would be killed
Severity = Literal['refusal', 'warning', 'unrestorable']
_SEVERITIES: Mapping[str, Severity] = {name: name for name in get_args(Severity)}


@dataclass(frozen=True, slots=True)
class Finding:
    """A reason why a tree cannot be dumped or restored. With another severity than 'refusal': what will be lost."""
    pid: int         # the task as the daemon sees it, 0 for the tree as a whole
    comm: str
    resource: str    # the part of the task: 'ptrace', 'fd 5', 'vma 7f0000000000-7f0000001000', 'namespace net'
    errno: str       # a name: 'EPERM'
    reason: str
    hint: str
    severity: Severity = 'refusal'

    def __str__(self) -> str:
        who = f'{self.comm}[{self.pid}]' if self.pid else 'tree'
        return f'{who}: {self.resource}: {self.reason} ({self.errno})'


def finding_from(row: Mapping[str, Any]) -> Finding:
    """Make a finding from a row of Manager.Check or of warnings. A missing field is left empty."""
    return Finding(pid=int(row.get('pid', 0)), severity=_SEVERITIES.get(str(row.get('severity')), 'refusal'),
                   **{key: str(row.get(key, '')) for key in ('comm', 'resource', 'errno', 'reason', 'hint')})


class CkptError(Exception):
    """An operation failed. `task` is a pid as the daemon sees it, `phase` the job phase in which the error happened."""
    name: ClassVar[str] = 'Failed'
    default_errno: ClassVar[int] = _errno.EIO
    exit_status: ClassVar[int] = 1
    default_hint: ClassVar[str] = ''

    def __init__(self, message: str, *, errno: int | None = None, task: int = 0, resource: str = '', phase: str = '',
                 hint: str | None = None, refusals: Iterable[Finding] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.errno = self.default_errno if errno is None else errno
        self.task, self.resource, self.phase = task, resource, phase
        self.hint = self.default_hint if hint is None else hint
        self.refusals = tuple(refusals)

    @property
    def dbus_name(self) -> str:
        return ERROR_PREFIX + self.name

    def details(self) -> dict[str, Any]:
        """Return {'errno': 'EPERM', 'task': 12, 'resource': 'fd 3', 'phase': 'scan', 'hint': ..., 'refusals':
        [{...}]}."""
        return {'errno': errno_name(self.errno), 'task': self.task, 'resource': self.resource, 'phase': self.phase,
                'hint': self.hint, 'refusals': [asdict(refusal) for refusal in self.refusals]}


class InvalidArgument(CkptError):
    """The request itself is wrong: an unknown option, a bad target, a value out of range."""
    name = 'InvalidArgument'
    default_errno = _errno.EINVAL
    exit_status = 2


class Refused(CkptError):
    """The tree cannot be dumped. `refusals` holds every reason; on the bus it holds the first hundred."""
    name = 'Refused'
    default_errno = _errno.EOPNOTSUPP
    exit_status = 3
    default_hint = 'run "ckptctl check TARGET" to see every reason again'

    @classmethod
    def because(cls, refusals: Iterable[Finding], phase: str = '') -> 'CkptError':
        """Return the error for these refusals: PermissionDenied if any is EPERM, NotFrozen for EBUSY, else Refused.

        A namespace is refused with EPERM (as in Linux-CR), but it is not a right that is missing.
        """
        return cls._of(refusals, phase, {'EPERM': PermissionDenied, 'EBUSY': NotFrozen, 'EAGAIN': TreeChanged})

    @classmethod
    def restart(cls, refusals: Iterable[Finding], phase: str = '') -> 'CkptError':
        """Return the error for the refusals of a restart: ImageDamaged for EBADMSG, PermissionDenied for EPERM.

        If all refusals are EEXIST or EBUSY (a number, file or segment is in use) the error is Busy. Otherwise it is
        Refused.
        """
        rows = tuple(refusals)
        kinds: dict[str, type[CkptError]] = {'EBADMSG': ImageDamaged, 'EPERM': PermissionDenied}
        if all(row.errno in ('EEXIST', 'EBUSY') for row in rows):
            kinds |= {'EEXIST': Busy, 'EBUSY': Busy}
        return cls._of(rows, phase, kinds)

    @classmethod
    def _of(cls, refusals: Iterable[Finding], phase: str, kinds: 'Mapping[str, type[CkptError]]') -> 'CkptError':
        rows = tuple(refusals)
        first = next((row for name in ('EBADMSG', 'EPERM') if name in kinds for row in rows
                      if row.errno == name and not row.resource.startswith(NAMESPACE)), rows[0])
        kind = Refused if first.resource.startswith(NAMESPACE) else kinds.get(first.errno, Refused)
        more = f' (and {len(rows) - 1} more)' if len(rows) > 1 else ''
        return kind(f'{first}{more}', errno=getattr(_errno, first.errno, kind.default_errno), task=first.pid,
                    resource=first.resource, phase=phase, hint=first.hint, refusals=rows)


class PermissionDenied(CkptError):
    """The caller may not do this to that task, job or image."""
    name = 'PermissionDenied'
    default_errno = _errno.EPERM
    exit_status = 4
    default_hint = 'run as the owner of the tree, or as root'


class NotFrozen(CkptError):
    """The option freeze=caller was given, but a task of the tree is running."""
    name = 'NotFrozen'
    default_errno = _errno.EBUSY
    exit_status = 3
    default_hint = 'freeze the tree first, or leave out freeze=caller'


class Busy(CkptError):
    """Another job works on this tree or image."""
    name = 'Busy'
    default_errno = _errno.EBUSY
    exit_status = 75
    default_hint = 'wait for the other job (ckptctl jobs) and try again'


class TreeChanged(CkptError):
    """Tasks of the tree died or were created while they were counted."""
    name = 'TreeChanged'
    default_errno = _errno.EAGAIN
    exit_status = 75
    default_hint = 'try again; a tree that forks all the time needs a cgroup of its own'


class FreezeTimeout(CkptError):
    """The tree did not come to rest within the deadline."""
    name = 'FreezeTimeout'
    default_errno = _errno.ETIMEDOUT
    exit_status = 124
    default_hint = 'a task in uninterruptible sleep (D) waits for a device; try again later or with a longer --timeout'


class NoSuchTarget(CkptError):
    """No task, unit or cgroup has that name."""
    name = 'NoSuchTarget'
    default_errno = _errno.ESRCH
    exit_status = 5
    default_hint = 'a target is pid:N, a unit name, cgroup:/path or self'


class NoSuchJob(CkptError):
    name = 'NoSuchJob'
    default_errno = _errno.ENOENT
    exit_status = 5
    default_hint = 'run "ckptctl jobs" to see what is there'


class NoSuchImage(CkptError):
    name = 'NoSuchImage'
    default_errno = _errno.ENOENT
    exit_status = 5
    default_hint = 'run "ckptctl list" to see what is there'


class ImageDamaged(CkptError):
    """A part of an image is missing, cut short or altered, or has contents that make no sense."""
    name = 'ImageDamaged'
    default_errno = _errno.EBADMSG
    exit_status = 6
    default_hint = 'run "ckptctl verify IMAGE" for the list of damages; the image cannot be used'


class SpoolFailed(CkptError):
    """The spool cannot take the image: it is full, over quota, read-only, or gone. Nothing was left behind."""
    name = 'SpoolFailed'
    default_errno = _errno.ENOSPC
    default_hint = 'free space in the spool (ckptctl remove IMAGE) or choose another spool with --spool DIR'


class Cancelled(CkptError):
    """The job was cancelled; the tree runs on and nothing was written."""
    name = 'Cancelled'
    default_errno = _errno.ECANCELED
    exit_status = 130


class WorkerDied(CkptError):
    """The worker process of the job died; the daemon released the tree and cleaned up."""
    name = 'WorkerDied'
    default_errno = _errno.EPIPE
    default_hint = 'the tree runs on; see the daemon\'s log, then try again'


class LimitsExceeded(CkptError):
    """A bound on jobs, images, bytes or messages was reached."""
    name = 'LimitsExceeded'
    default_errno = _errno.EDQUOT
    exit_status = 75


class NotSupported(CkptError):
    """The kernel, machine or installation lacks something that the operation needs."""
    name = 'NotSupported'
    default_errno = _errno.EOPNOTSUPP
    default_hint = 'run "ckptctl doctor" to see what is missing and how to get it'


class Unavailable(CkptError):
    """No daemon answers on the bus."""
    name = 'Unavailable'
    default_errno = _errno.ENOTCONN
    exit_status = 69
    default_hint = 'start the daemon (systemctl start ckptd), or use --standalone'


def all_errors() -> dict[str, type[CkptError]]:
    """Return every class of the tree by its short D-Bus name."""
    found: dict[str, type[CkptError]] = {}
    todo: list[type[CkptError]] = [CkptError]
    while todo:
        cls = todo.pop()
        found[cls.name] = cls
        todo.extend(cls.__subclasses__())
    return found


def from_details(dbus_name: str, message: str, details: Mapping[str, Any]) -> CkptError:
    """Rebuild the error that `details()` described. An unknown name becomes a plain CkptError.

    The input may come from any program, so every field is converted or dropped.
    """
    cls = all_errors().get(dbus_name.removeprefix(ERROR_PREFIX), CkptError)
    number = getattr(_errno, str(details.get('errno', '')), None)
    fields = Finding.__dataclass_fields__
    refusals = [Finding(**{key: value for key, value in row.items() if key in fields})
                for row in details.get('refusals', ()) if {'pid', 'reason'} <= row.keys()]
    return cls(message, errno=number, task=int(details.get('task', 0)), resource=str(details.get('resource', '')),
               phase=str(details.get('phase', '')), hint=str(details.get('hint', '')), refusals=refusals)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""seccomp(2): strict mode, or the chain of filters of a thread.

Filters see the calls of a task, also those that it makes for us. So they are suspended (PTRACE_O_SUSPEND_SECCOMP) until
the tracer detaches, in a dump and in a restart. Therefore a restart can install them while its stubs have every right.

Threads of a process get the filters that all of them have from the first thread (SECCOMP_FILTER_FLAG_TSYNC). They then
share them, as seccomp(2) requires for a further TSYNC of the program. Filters that only some threads share are
installed for each of them.
"""

import errno
import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache

from ckptd.errors import SECCOMP, Finding, NotSupported
from ckptd.image.grammar import U8, U32, Struct, layout
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.image.records import TaskAttribute
from ckptd.kernel.ptrace import Tracee
from ckptd.kernel.seccomp import (
    BPF_MAXINSNS,
    SECCOMP_FILTER_FLAG_LOG,
    SECCOMP_FILTER_FLAG_SPEC_ALLOW,
    SECCOMP_FILTER_FLAG_TSYNC,
    SECCOMP_FILTER_FLAG_TSYNC_ESRCH,
    SECCOMP_MODE_FILTER,
    SECCOMP_MODE_STRICT,
    SECCOMP_SET_MODE_FILTER,
    SECCOMP_SET_MODE_STRICT,
    Filter,
    may_suspend,
    read_filters,
)
from ckptd.kernel.status import Status
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
from ckptd.tree import Task

_NAME = SECCOMP
_MODES = {SECCOMP_MODE_STRICT: 'strict mode', SECCOMP_MODE_FILTER: 'filters'}
_SIZE = 8               # of struct sock_filter
_DEAD = (ord('Z'), ord('X'))
_HINT = ('checkpoint it as root, with --as-root, where ckptd itself is under no seccomp filter; or start it without '
         'one (systemd: SystemCallFilter=, RestrictNamespaces= and others set some)')


@layout
class SeccompFilter(Struct):
    """A filter."""
    program: bytes      # instructions, each a struct sock_filter
    flags: U32          # SECCOMP_FILTER_FLAG_LOG or 0


@layout
class Filters(Struct):
    """The seccomp state of a thread."""
    mode: U8                                # SECCOMP_MODE_*
    filters: tuple[SeccompFilter, ...]      # the oldest first; none in strict mode


class Seccomp(Attribute[Filters, tuple[Filter, ...]], name=_NAME, stage=Stage.LIMITS):
    support = Support('seccomp filters and strict mode',
                      refused='a filter that notifies a supervisor; all, where ckptd is under a filter itself',
                      user='refused')

    # ------------------------------------------------------------ dump

    def findings(self, task: Task, status: Status) -> list[Finding]:
        if not status.seccomp or may_suspend():
            return []
        mode = 'strict mode' if status.seccomp == SECCOMP_MODE_STRICT else f'{status.seccomp_filters or "a"} filter(s)'
        return [Finding(task.tid, task.comm, _NAME, 'EACCES',
                        f'runs under seccomp: {mode}, which only an administrator may read', _HINT)]

    def lend(self, status: Status, tracee: Tracee) -> None:
        if status.seccomp:
            tracee.suspend_seccomp()

    def look(self, tracee: Tracee) -> tuple[Filter, ...]:
        try:
            return read_filters(tracee.tid)
        except PermissionError:
            return ()       # no task of a tree that passed the checks has one
        except OSError as error:
            if error.errno != errno.EMEDIUMTYPE:
                raise
            raise _cannot(tracee.tid, 'has a seccomp filter that the kernel does not show', error) from error

    def require(self, task: Task, answer: tuple[Filter, ...]) -> None:
        if any(one.notifies for one in answer):
            raise _cannot(task.tid, f'{task.comm} has a seccomp filter that asks a supervisor (seccomp_unotify)')

    def dump(self, of: DumpedTask, answer: tuple[Filter, ...]) -> Filters | None:
        if not of.status.seccomp:
            return None
        return Filters(of.status.seccomp, tuple(SeccompFilter(one.program, one.flags) for one in answer))

    # ------------------------------------------------------------ restart

    def obstacles(self, record: Filters, task: ImageTask, rights: RestartRights) -> Iterator[Finding]:
        if not _is_sound(record):
            yield about(task.vpid, _NAME, 'EBADMSG', 'the image has a seccomp filter that no kernel takes',
                        'the image is damaged')
        elif rights.is_users_worker or rights.in_user_namespace or not may_suspend():
            yield about(task.vpid, _NAME, 'EACCES', f'had seccomp {_MODES[record.mode]}, which only an administrator '
                        'may set again for a tree', 'restore it as root, where ckptd itself is under no seccomp filter')

    def restore(self, record: Filters, to: RestoredTask) -> None:
        if record.mode == SECCOMP_MODE_STRICT:
            to.script.call('seccomp', SECCOMP_SET_MODE_STRICT, 0, 0, about=_NAME)
            return
        first, shared = _shared(to.means.reader, to.task.vtgid)
        for number, one in enumerate(record.filters):
            # the kernel does not tell whether a filter was installed with it; without, it may change the controls of
            # speculation, which are an attribute of their own
            flags = one.flags | SECCOMP_FILTER_FLAG_SPEC_ALLOW
            if number < shared:
                if to.vpid != first:
                    continue
                flags |= SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_TSYNC_ESRCH
            program = struct.pack('=H6xQ', len(one.program) // _SIZE, 0)       # struct sock_fprog
            to.script.call_with_pointer('seccomp', (SECCOMP_SET_MODE_FILTER, flags), 2, program, (8,), one.program,
                                        about=_NAME)


def _is_sound(record: Filters) -> bool:
    if record.mode == SECCOMP_MODE_STRICT:
        return not record.filters
    return record.mode == SECCOMP_MODE_FILTER and bool(record.filters) and all(
        not one.flags & ~SECCOMP_FILTER_FLAG_LOG and not len(one.program) % _SIZE
        and 0 < len(one.program) <= BPF_MAXINSNS * _SIZE for one in record.filters)


def _shared(reader: ImageReader, vtgid: int) -> tuple[int, int]:
    """Return the first thread of a process, and how many filters it installs for all threads."""
    threads = [task for task in reader.tasks if task.vtgid == vtgid]
    alive = [task.vpid for task in threads if task.record.state not in _DEAD]
    if len(alive) < 2 or len(alive) < len(threads):     # a thread that is to end does so under no filter
        return alive[0], 0
    chains = [_records(reader).get(vpid, ()) for vpid in alive]
    count = 0
    for level in zip(*chains, strict=False):
        if len(set(level)) > 1:
            break
        count += 1
    return alive[0], count


@lru_cache(maxsize=1)
def _records(reader: ImageReader) -> Mapping[int, tuple[SeccompFilter, ...]]:
    """Return the filters of all threads of the image, by vpid."""
    return {one.owner: Filters.decode(one.data).filters for one in reader.every(TaskAttribute)
            if one.name == _NAME and one.scope == Scope.THREAD}


def _cannot(tid: int, what: str, cause: OSError | None = None) -> NotSupported:
    return NotSupported(f'task {tid}: {what}', errno=cause.errno if cause else None, task=tid, resource=_NAME,
                        phase='state', hint='a program under such a filter cannot be checkpointed')

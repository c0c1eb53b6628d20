# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ask the kernel, with the credentials of the caller, whether it may inspect and trace these tasks.

A forked child takes the caller's uid, gid, groups and capabilities and calls kcmp(tid, tid, KCMP_VM). The kernel then
checks ptrace_may_access(PTRACE_MODE_READ_REALCREDS) with everything that counts: ids, capabilities, dumpable, LSMs.
Next the child calls pidfd_getfd(2) for an fd that no process has. This checks PTRACE_MODE_ATTACH_REALCREDS: Yama and
other LSMs let more processes read than trace. One child asks about all tasks and returns one errno per task through a
pipe.
"""

import array
import errno
import os
from collections.abc import Sequence
from typing import Protocol

from ckptd.errors import Finding, NotSupported, errno_name
from ckptd.fileio import write_all
from ckptd.inspect.checks.rows import dead, refuse
from ckptd.kernel.creds import CAP_SETGID, UserIds, become, capget
from ckptd.kernel.fork import quiet_fork, run_and_exit
from ckptd.kernel.kcmp import KCMP_VM, kcmp
from ckptd.kernel.pidfd import PIDFD_THREAD, held, pidfd_getfd, pidfd_open
from ckptd.kernel.yama import untraceable
from ckptd.tree import Task, Tree

ALL_CAPABILITIES = (1 << 64) - 1
_NO_FD = -1         # EBADF for a process that may get fds of the task


class CallerRights(UserIds, Protocol):
    """The calling process.

    capabilities: its effective set as a mask, -1 if unknown. start_time: 0 if unknown. confinement: names of what
    confines it to itself and its descendants.
    """
    @property
    def pid(self) -> int: ...
    @property
    def capabilities(self) -> int: ...
    @property
    def start_time(self) -> int: ...
    @property
    def confinement(self) -> Sequence[str]: ...


def check_access(tree: Tree, caller: CallerRights, *, trace: bool = False) -> list[Finding]:
    """List a refusal for each task that the caller may not inspect; a single one if ckptd cannot act as the caller.

    trace: list also each living task that the caller may inspect but not trace.
    """
    answers = probe(caller, [task.tid for task in tree], trace=trace)
    if isinstance(answers, int):
        return [Finding(0, '', 'credentials', errno_name(answers),
                        f'ckptd, running as uid {os.geteuid()}, cannot act for uid {caller.uid}',
                        'use the ckptd of that user, or one that runs as root')]
    rows = []
    for task, answer in zip(tree, answers, strict=True):
        if answer == errno.ESRCH:
            rows.append(dead(task))
        elif answer > 0:
            rows.append(refuse(task, 'ptrace', errno_name(answer), f'uid {caller.uid} may not inspect this task',
                               'run as the owner of the task, or as root'))
        elif answer < 0 and not task.is_zombie:
            rows.append(_untraceable(task, caller.uid, -answer))
    return rows


def is_untraceable(tree: Tree, caller: CallerRights) -> bool:
    """Whether there are living tasks that the caller may inspect but not trace."""
    answers = probe(caller, [task.tid for task in tree], trace=True)
    return not isinstance(answers, int) and any(
        answer < 0 and not task.is_zombie for task, answer in zip(tree, answers, strict=True))


def _untraceable(task: Task, uid: int, answer: int) -> Finding:
    forbidden = untraceable()
    return refuse(task, 'ptrace', errno_name(answer), f'uid {uid} may inspect this task but not trace it: '
                  + forbidden.reason, forbidden.hint)


def probe(caller: CallerRights, tids: Sequence[int], *, trace: bool = False) -> list[int] | int:
    """Return an errno for each task, 0 if allowed; or one errno if the child could not become the caller. NotSupported.

    trace: for a task that may be inspected but not traced, the errno is negative.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(read_end, 'rb') as answer:
        try:
            child = quiet_fork()
            if child == 0:
                run_and_exit(lambda: _answer(caller, tids, write_end, trace))
        finally:
            os.close(write_end)
        data = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        # it was killed by its new owner, or could not take the ids: in any case the kernel did not allow it
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else errno.EPERM
    found = array.array('i', data)
    if found[0]:
        raise NotSupported(f'kcmp(2) is not available: {os.strerror(found[0])}', errno=found[0], resource='kcmp',
                           hint='use a kernel with CONFIG_KCMP and a container profile that allows kcmp')
    return list(found[1:])


def _answer(caller: CallerRights, tids: Sequence[int], answer: int, trace: bool) -> None:
    """Become the caller, try every task and write the answers of `probe` to the pipe."""
    become(caller.uid, *_groups(caller), _capabilities(caller))
    # the first answer, about the child itself, distinguishes a missing system call from a missing right
    found = array.array('i', [_inspect_errno(tid) for tid in (os.getpid(), *tids)])
    if trace and not _trace_errno(os.getpid()):
        found[1:] = array.array('i', [one or -_trace_errno(tid) for one, tid in zip(found[1:], tids, strict=True)])
    write_all(answer, found.tobytes())


def _inspect_errno(tid: int) -> int:
    """Return the errno of inspecting a task, 0 if allowed."""
    try:
        kcmp(tid, tid, KCMP_VM)
    except OSError as error:
        return error.errno or errno.EPERM
    return 0


def _trace_errno(tid: int) -> int:
    """Return the errno of tracing a task that may be inspected, 0 if allowed. Also 0 if the kernel cannot be asked."""
    try:
        pidfd = pidfd_open(tid, PIDFD_THREAD)
    except OSError:
        # It is gone; or the kernel is older than 6.9 and has pidfds of leaders only. The tracer will get the error.
        return 0
    try:
        pidfd_getfd(pidfd, _NO_FD)
    except OSError as error:
        return error.errno if error.errno in (errno.EPERM, errno.EACCES) else 0
    finally:
        os.close(pidfd)
    return 0


def _groups(caller: CallerRights) -> tuple[int, Sequence[int]]:
    # an ordinary user's own ckptd cannot change groups and need not: the caller has the same uid
    if caller.uid == os.getuid() and not capget().effective >> CAP_SETGID & 1:
        return os.getgid(), os.getgroups()
    return caller.gid, caller.groups


def _capabilities(caller: CallerRights) -> int:
    """Return the mask of capabilities that the caller may use here. Unknown means all for root and none for other
    users."""
    mask = caller.capabilities if caller.capabilities >= 0 else ALL_CAPABILITIES if caller.uid == 0 else 0
    return mask if not mask or _same_user_namespace(caller) else 0


def _same_user_namespace(caller: CallerRights) -> bool:
    """Whether the caller is in our user namespace. A capability counts only there, and root of a container has them
    all.

    If the caller is gone, this is assumed only for uid 0, which is root here or was made from it.
    """
    try:
        with held(caller.pid, caller.start_time):
            theirs = os.stat(f'/proc/{caller.pid}/ns/user').st_ino  # noqa: PTH116
        return theirs == os.stat('/proc/self/ns/user').st_ino  # noqa: PTH116
    except OSError:
        return caller.uid == 0

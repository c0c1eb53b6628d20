# SPDX-License-Identifier: LGPL-2.1-or-later
"""May the caller look at these tasks? The kernel decides, asked with the caller's credentials.

A forked child takes the caller's uid, gid, groups and capabilities and calls kcmp(tid, tid, KCMP_VM), which asks
ptrace_may_access(PTRACE_MODE_READ_REALCREDS) with all that goes into it: ids, capabilities, dumpable, LSMs. All tasks
are asked in one child; it answers with one errno per task through a pipe.
"""

import array
import errno
import os
import warnings
from collections.abc import Sequence
from typing import Protocol

from ckptd.checks.rows import dead, refuse
from ckptd.errors import NotSupported, Refusal, errno_name
from ckptd.kernel.creds import CAP_SETGID, become, capget
from ckptd.kernel.kcmp import KCMP_VM, kcmp
from ckptd.kernel.pidfd import held
from ckptd.picture import Recipient
from ckptd.tree import Tree

ALL_CAPABILITIES = (1 << 64) - 1


class Caller(Recipient, Protocol):
    """Who asks. capabilities: the effective set of the calling process as a mask, -1 if unknown. start_time: of that
    process, 0 if unknown. confinement: what keeps that process from more than itself and what is below it."""
    @property
    def pid(self) -> int: ...
    @property
    def capabilities(self) -> int: ...
    @property
    def start_time(self) -> int: ...
    @property
    def confinement(self) -> Sequence[str]: ...


def check_access(tree: Tree, caller: Caller) -> list[Refusal]:
    """A refusal for each task that the caller may not look at; one for the tree if we cannot ask as the caller."""
    tids = [task.tid for task in tree]
    answers = probe(caller, tids)
    if isinstance(answers, int):
        return [Refusal(0, '', 'credentials', errno_name(answers),
                        f'ckptd, running as uid {os.geteuid()}, cannot act for uid {caller.uid}',
                        'use the ckptd of that user, or one that runs as root')]
    rows = []
    for task, answer in zip(tree, answers, strict=True):
        if answer == errno.ESRCH:
            rows.append(dead(task))
        elif answer:
            rows.append(refuse(task, 'ptrace', errno_name(answer), f'uid {caller.uid} may not look at this task',
                               'ask as the owner of the task, or as root'))
    return rows


def probe(caller: Caller, tids: Sequence[int]) -> list[int] | int:
    """errno of each task, 0 for yes; or one errno if the child could not become the caller. NotSupported."""
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(read_end, 'rb') as answer:
        try:
            child = _fork()
            if child == 0:
                _child(caller, tids, write_end)
        finally:
            os.close(write_end)
        data = answer.read()
    _, status = os.waitpid(child, 0)
    if status:
        # killed by its new owner, or refused the ids: either way the kernel did not say yes
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else errno.EPERM
    found = array.array('i', data)
    if found[0]:
        raise NotSupported(f'kcmp(2) is not to be had: {os.strerror(found[0])}', errno=found[0], resource='kcmp',
                           hint='a kernel with CONFIG_KCMP, and a container profile that allows kcmp, are needed')
    return list(found[1:])


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads, for locks that they may hold; the child takes none, it only does
        # system calls and _exit()
        warnings.simplefilter('ignore', DeprecationWarning)
        return os.fork()


def _child(caller: Caller, tids: Sequence[int], answer: int) -> None:
    status = errno.EIO
    try:
        become(caller.uid, *_groups(caller), _capabilities(caller))
        # the first answer, about the child itself, tells a missing system call from a missing right
        found = array.array('i', [_ask(tid) for tid in (os.getpid(), *tids)])
        left = memoryview(found).cast('B')
        while left:
            left = left[os.write(answer, left):]
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    finally:
        os._exit(status)


def _ask(tid: int) -> int:
    try:
        kcmp(tid, tid, KCMP_VM)
    except OSError as error:
        return error.errno or errno.EPERM
    return 0


def _groups(caller: Caller) -> tuple[int, Sequence[int]]:
    # an ordinary user's own ckptd cannot change groups and need not: the caller has the same uid
    if caller.uid == os.getuid() and not capget().effective >> CAP_SETGID & 1:
        return os.getgid(), os.getgroups()
    return caller.gid, caller.groups


def _capabilities(caller: Caller) -> int:
    """The mask of what the caller may use here. Unknown is all for root and nothing for everybody else."""
    mask = caller.capabilities if caller.capabilities >= 0 else ALL_CAPABILITIES if caller.uid == 0 else 0
    return mask if not mask or _same_user_namespace(caller) else 0


def _same_user_namespace(caller: Caller) -> bool:
    """A capability counts in the user namespace of its holder, and root of a container has them all.

    A caller that is gone can be asked no more; then only uid 0, which is root here or was made from it, is believed.
    """
    try:
        with held(caller.pid, caller.start_time):
            theirs = os.stat(f'/proc/{caller.pid}/ns/user').st_ino  # noqa: PTH116
        return theirs == os.stat('/proc/self/ns/user').st_ino  # noqa: PTH116
    except OSError:
        return caller.uid == 0

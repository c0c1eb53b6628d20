# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check System V semaphores and message queues that the tree has used. They belong to no process, so they are outside
of the tree, unless the user names them (ckptd.sysv): a restart finds them as they are then.

What a process would undo of its semaphores at its end (SEM_UNDO, semop(2)) is shown nowhere, and the kernel undoes it
when the process is killed. Every process that has or had threads has a list of that, mostly an empty one. So a process
is said to undo something only if it also was the last one that changed a semaphore.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from ckptd.errors import Finding, Severity
from ckptd.inspect.checks.rows import ProcessIds, processes
from ckptd.kernel.fork import waiting_child
from ckptd.kernel.kcmp import EQUAL, KCMP_SYSVSEM, kcmp
from ckptd.kernel.msg import list_queues
from ckptd.kernel.sem import SemaphoreSet, last_users, list_sets
from ckptd.objects.ipc.registry import are_in_image, findings
from ckptd.sysv import SysvName
from ckptd.tree import Task

_MOST = 100_000         # semaphores that are looked at


def check_system_v(tasks: Collection[Task], names: Sequence[SysvName] = ()) -> list[Finding]:
    """List a warning for each set and queue that a process of the tree was the last one to use, and a row for each
    process that may have adjustments to undo; and the refusals of objects that are named."""
    used = {process.leader.tgid: process for process in processes(tasks)}
    root = next(iter(used.values()), None)
    if root is None:
        return []
    refused = list(findings(names, root.reader.tid))
    if not _is_our_namespace(root.reader.tid):
        return refused
    return [*refused, *_of_semaphores(used, names), *_of_queues(used, names)]


def _is_our_namespace(tid: int) -> bool:
    with suppress(OSError):
        return os.path.samefile(f'/proc/{tid}/ns/ipc', '/proc/self/ns/ipc')  # noqa: PTH121
    return False


def _of_semaphores(used: dict[int, ProcessIds], names: Sequence[SysvName]) -> Iterator[Finding]:
    changers: dict[int, list[int]] = {}
    for one in _used_sets():
        # EACCES: the right to read it is missing, and with it the right to know; EINVAL, EIDRM: it was removed
        with suppress(OSError):
            if found := used.keys() & set(last_users(one)):
                pid = min(found)
                if not are_in_image(names, 'sem', one.semid):
                    yield _row(used[pid], f'semid {one.semid}', 'ENODATA', 'has used the System V semaphores '
                               f'{one.semid}{_key(one.key)}', _outside(f'sem:{one.semid}'))
                for changer in found:
                    changers.setdefault(changer, []).append(one.semid)
    if not changers:
        return
    with waiting_child() as other:      # fork(2) gives a child no list of adjustments
        for pid, sets in changers.items():
            with suppress(OSError):         # no right to look, which another check reports; or it has ended
                if kcmp(used[pid].reader.tid, other, KCMP_SYSVSEM) != EQUAL:
                    yield _row(used[pid], 'SEM_UNDO', 'EOPNOTSUPP', 'may have to undo changes of the System V '
                               f'semaphores {", ".join(map(str, sets))} at its end (SEM_UNDO), which the kernel does '
                               'not show', 'a restarted process undoes nothing; a kill undoes it at once',
                               severity='unrestorable')


def _used_sets() -> Iterator[SemaphoreSet]:
    left = _MOST
    for one in list_sets():
        left -= one.nsems
        if one.used and left >= 0:
            yield one


def _of_queues(used: dict[int, ProcessIds], names: Sequence[SysvName]) -> Iterator[Finding]:
    for one in list_queues():
        found = used.keys() & {one.sender, one.receiver}
        if found and not are_in_image(names, 'msg', one.msqid):
            yield _row(used[min(found)], f'msqid {one.msqid}', 'ENODATA', f'has used the System V message queue '
                       f'{one.msqid}{_key(one.key)}, which has {one.messages} messages',
                       _outside(f'msg:{one.msqid}'))


def _outside(name: str) -> str:
    return (f'without --sysv={name} it is not in the image: a restart finds it as it is then, and after a boot it is '
            'gone')


def _key(key: int) -> str:
    return f' (key {key:#x})' if key else ''


def _row(process: ProcessIds, resource: str, errno: str, reason: str, hint: str,
         severity: Severity = 'warning') -> Finding:
    return Finding(process.leader.tid, process.leader.comm, resource, errno, reason, hint, severity)

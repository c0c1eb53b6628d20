# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check each task for a state, tracer, namespace or program that prevents a dump."""

import re
from collections.abc import Iterable, Set
from pathlib import Path

from ckptd.errors import Finding
from ckptd.inspect.checks.access import CallerRights
from ckptd.inspect.checks.hidden import name_of
from ckptd.inspect.checks.rows import ProcessIds, dead, guarded, processes, refuse, warn
from ckptd.inspect.proc_cache import ProcCache
from ckptd.kernel.namei import lstat_of_task
from ckptd.kernel.procfs import read_task_file, task_dir
from ckptd.kernel.stat import PF_KTHREAD, PF_USER_WORKER
from ckptd.kernel.status import Status, read_status
from ckptd.kernel.task import read_auxv, read_link, read_namespaces
from ckptd.objects.attributes.registry import findings
from ckptd.objects.namespaces import registry as namespace_kinds
from ckptd.tree import Task, Tree

DELETED = ' (deleted)'
# <asm/unistd_64.h>: clone, fork, vfork, clone3. A parent in one of these and in state D waits for a CLONE_VFORK child.
_FORKS = {56, 57, 58, 435}
_OF_PROCESS = re.compile(r'/proc/(\d+)(?:/|$)')


def check_tasks(tree: Tree, tasks: Iterable[Task], cache: ProcCache, caller: CallerRights) -> list[Finding]:
    """Run the checks of single tasks. `tasks` are those of the tree that may be inspected."""
    tasks = list(tasks)
    home = _root_namespaces(tree)
    found: list[Finding] = []
    for task in tasks:
        found += guarded(task, 'task', _check_task, task, home, cache, caller)
    if root := next((task for task in tasks if not task.is_zombie), None):
        found += guarded(root, 'task', namespace_kinds.unrestorable, root)
    for process in processes(tasks):
        found += guarded(process.leader, 'process', _check_process, process, {task.vtgid for task in tree})
    return found


def _check_task(task: Task, home: dict[str, int], cache: ProcCache, caller: CallerRights) -> list[Finding]:
    if task.flags & (PF_KTHREAD | PF_USER_WORKER):
        return check_kthread(task)      # nothing else of it needs a check
    status = cache.status(task)
    if status.state in 'Xx':
        return [dead(task)]
    if status.state == 'Z':
        return []
    return (check_tracer(task, status, caller) + namespace_kinds.findings(task, home)
            + check_vfork(task, status) + findings(task, status))


def check_kthread(task: Task) -> list[Finding]:
    what = 'is a kernel thread' if task.flags & PF_KTHREAD else 'is a worker thread of the kernel (vhost)'
    return [refuse(task, 'task', 'EOPNOTSUPP', what, 'only user programs can be checkpointed')]


def check_tracer(task: Task, status: Status, caller: CallerRights) -> list[Finding]:
    tracer = status.tracer_pid
    if not tracer or Path(f'/proc/self/task/{tracer}').exists():
        return []
    name = name_of(tracer, _name(tracer), caller)
    return [refuse(task, 'ptrace', 'EBUSY', f'is traced by {name}, and a task can have one tracer only',
                   'detach the debugger or strace first')]


def _name(pid: int) -> str:
    try:
        return read_status(pid).name
    except OSError:
        return '?'


def check_vfork(task: Task, status: Status) -> list[Finding]:
    """Refuse a parent suspended by vfork(2) or posix_spawn(3), which cannot be stopped until the child execs or
    exits."""
    if status.state != 'D':
        return []
    number = read_task_file(task_dir(task.tgid, task.tid), 'syscall').split()[0]
    if not number.isdigit() or int(number) not in _FORKS:
        return []
    return [refuse(task, 'task', 'EAGAIN', 'waits in vfork for its child to run a program',
                   'try again; a child that never runs a program cannot be dumped yet')]


def _root_namespaces(tree: Tree) -> dict[str, int]:
    for task in tree:
        try:
            found = read_namespaces(task.tgid, task.tid)
        except OSError:
            continue
        if not task.is_zombie and found:
            return found
    return {}


def _check_process(process: ProcessIds, vpids: Set[int]) -> list[Finding]:
    return check_32bit(process) + check_paths(process, vpids)


def check_32bit(process: ProcessIds) -> list[Finding]:
    """Refuse a program that was started as 32-bit: its auxiliary vector has 32-bit words (fs/compat_binfmt_elf.c).

    The vector is the kernel's copy from exec, so neither a changed exe nor setarch(8) misleads. A 64-bit program that
    jumps to a 32-bit code segment is detected by its registers only, once it is stopped.
    """
    words = read_auxv(process.reader.tid)[:8]
    # The first key is below 64. In a 64-bit vector it takes eight bytes; with 32-bit words the upper four bytes are its
    # value.
    if int.from_bytes(words, 'little') < 1 << 32:
        return []
    return [refuse(process.leader, 'exe', 'EOPNOTSUPP', 'is a 32-bit program', 'only 64-bit tasks can be checkpointed')]


def check_paths(process: ProcessIds, vpids: Set[int]) -> list[Finding]:
    """Check directories and the program that a restart will look for by name. vpids: processes of the tree, whose
    directories in /proc are not there when a restart begins."""
    found: list[Finding] = []
    for name in ('cwd', 'root', 'exe'):
        try:
            path = read_link(process.reader.tid, name)
        except FileNotFoundError:       # it is exiting
            continue
        if (shown := _OF_PROCESS.match(path)) and int(shown[1]) in vpids:
            found.append(refuse(process.leader, name, 'EOPNOTSUPP', f'{path} exists only while that process does',
                                'let the program leave that directory before the checkpoint'))
        elif path.endswith(DELETED) and lstat_of_task(process.reader.tid, path) is None:
            found.append(warn(process.leader, name, 'ENOENT', f'{path.removesuffix(DELETED)} is deleted',
                              'the image keeps a deleted program' if name == 'exe' else
                              'a restart makes another directory there, with the usual mode, and removes it'))
    return found

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live tree: from a target to its roots, from the roots to a Tree, and a pidfd for each process.

    resolve_target(UnitTarget('demo.service'))      roots (100, 140), cgroup /system.slice/demo.service ...
    scan_tree((100, 140))                           100 leader, 100's other threads by tid, then for each thread of 100
                                                    its children, each the same way; then 140
    Handles(tree)                                   a pidfd per process

A scan reads one stat line per task and one children list per thread, so its time grows linearly with the tasks. The
tasks run meanwhile: one that vanishes during the scan is left out, one that is born may be missed. Two scans that
agree, the later one with the tree frozen, are the proof (Tree.changes).
"""

import errno
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from ckptd.errors import InvalidArgument, NoSuchTarget
from ckptd.kernel.cgroup import Cgroup, CgroupMount, mount_of
from ckptd.kernel.hidepid import is_hidden
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.pidfd import pidfd_open, pidfd_send_signal, wait_dead
from ckptd.kernel.stat import PF_IO_WORKER, Stat, read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_children, read_threads
from ckptd.kernel.units import unit_directories
from ckptd.target import CgroupTarget, ProcessTarget, Target
from ckptd.tree import Task, TaskId, Tree

# ---------------------------------------------------------------- targets


class ResolvedTarget(NamedTuple):
    """A target as it is found at a moment."""
    roots: tuple[int, ...]      # pids, the main one first
    cgroup: str | None          # path below the v2 mount of a target that is all of a cgroup; None for other trees
    unit: str | None
    description: str            # for a message: 'process 7', 'unit a.service', 'cgroup /a'


def resolve_target(target: Target, manager: int | None = None, control: int = 0) -> ResolvedTarget:
    """Find the processes of a target. InvalidArgument, NoSuchTarget. manager: uid of the service manager of the unit, 0
    for the system's; None for ours. control: process of a command of the unit, such as ExecStop=. It and its
    descendants are no part of the tree; 0 for none."""
    match target:
        case ProcessTarget(pid=pid):
            return _process(pid)
        case CgroupTarget(path=path):
            return _cgroup(path)
    return _unit(target.name, os.geteuid() if manager is None else manager, control)


def _process(pid: int) -> ResolvedTarget:
    try:
        tgid = read_status(pid).tgid
    except ProcessLookupError:
        raise no_process(pid) from None
    if tgid != pid:
        raise InvalidArgument(f'{pid} is a thread of process {tgid}', task=pid,
                              hint=f'name the process: {ProcessTarget(tgid)}')
    _require_life(pid)
    return ResolvedTarget((pid,), None, None, f'process {pid}')


def no_process(pid: int) -> NoSuchTarget:
    return NoSuchTarget(f'no process {pid}', task=pid)


def _require_life(pid: int) -> None:
    """Check that some thread of a process lives, perhaps not the leader. NoSuchTarget for a zombie."""
    try:
        stat = read_stat(pid)
        dead = stat.state in 'ZX' and all(read_stat(pid, tid).state in 'ZX' for tid in read_threads(pid))
    except ProcessLookupError:
        return      # the next step finds that
    if dead:
        raise NoSuchTarget(f'process {pid} has ended, and only its exit status is left (a zombie)', task=pid,
                           hint=f'its parent, process {stat.ppid}, has not waited for it yet')


def _cgroup(path: str) -> ResolvedTarget:
    if path == '/':
        raise InvalidArgument('the root cgroup contains the whole system and cannot be frozen')
    directory = _mount().path / path.removeprefix('/')
    if not Cgroup(directory).exists:
        raise NoSuchTarget(f'no cgroup {path}')
    return ResolvedTarget(_cgroup_roots(directory, f'cgroup {path}'), path, None, f'cgroup {path}')


def _unit(unit: str, uid: int, control: int) -> ResolvedTarget:
    """Resolve a unit of the manager that may be asked to freeze it, the system's for uid 0."""
    mount = _mount()
    found = unit_directories(mount, uid, unit)
    if not found and uid:
        raise NoSuchTarget(f'no unit {unit} of the manager of uid {uid} has a cgroup',
                           hint=f'check "systemctl --user status {unit}"; for other units use cgroup:/PATH')
    if not found:
        raise NoSuchTarget(f'no unit {unit} has a cgroup',
                           hint=f'check "systemctl status {unit}": it may not run, or this is an alias')
    names = [f'/{path.relative_to(mount.path)}' for path in found]
    if len(found) > 1:
        raise InvalidArgument(f'{unit} has {len(found)} cgroups: {", ".join(names)}', hint='choose one: cgroup:/PATH')
    return ResolvedTarget(_cgroup_roots(found[0], f'unit {unit}', control), names[0], unit, f'unit {unit}')


def _mount() -> CgroupMount:
    mount = mount_of(read_mountinfo())
    if mount is None:
        raise NoSuchTarget('no cgroup v2 hierarchy is mounted', hint='choose a process: pid:N')
    return mount


def _cgroup_roots(directory: Path, description: str, without: int = 0) -> tuple[int, ...]:
    """Return processes of the cgroup and those below it whose parent is not one of them; the oldest first. without: a
    process that does not count.

    A service manager starts the main process first, and daemons that forked twice are younger.
    """
    found: list[Stat] = []
    for pid in Cgroup(directory).procs(recursive=True):
        with suppress(ProcessLookupError):
            found.append(read_stat(pid))
    members = {stat.pid for stat in found}
    if not members:
        raise NoSuchTarget(f'{description} has no processes')
    roots = [stat for stat in found if stat.ppid not in members and stat.pid != without]
    if not roots:
        raise NoSuchTarget(f'{description} has no processes but that of a command of it')
    return tuple(stat.pid for stat in sorted(roots, key=lambda stat: (stat.start_time, stat.pid)))


# ---------------------------------------------------------------- the scan

class _Visit(NamedTuple):
    """A process that is still to be read. parent_*: the thread that has it among its children, 0 for a root."""
    tgid: int
    parent_tid: int
    parent_tgid: int
    vppid: int
    depth: int


def scan_tree(roots: Sequence[int]) -> Tree:
    """Scan the tasks below `roots` (pids of processes), including these. NoSuchTarget if no root is alive."""
    level = pid_level(roots)
    # a stack rather than recursion: a chain of 10,000 processes is a legal tree
    stack = [_Visit(root, 0, 0, _outer_parent(root, level), 0) for root in reversed(roots)]
    tasks: list[Task] = []
    seen: set[int] = set()
    unseen = False
    while stack:
        visit = stack.pop()
        if visit.tgid in seen:      # reparented during the scan, from a thread already read to a later one
            continue
        seen.add(visit.tgid)
        threads = _scan_process(visit, level)
        unseen = unseen or (not threads and is_hidden(visit.tgid))
        tasks += threads
        children = [_Visit(child, thread.tid, thread.tgid, thread.vtgid, visit.depth + 1)
                    for thread in threads for child in _children(thread)]
        stack += reversed(children)
    if not tasks:
        raise _no_task(roots)
    return Tree(tuple(tasks), unseen)


def pid_level(roots: Sequence[int]) -> int:
    """Return the depth of the first living root below the pid namespace of /proc: the index of its vpid in NSpid."""
    for root in roots:
        with suppress(ProcessLookupError):
            return len(read_status(root).ns_pid) - 1
    raise _no_task(roots)


def _no_task(roots: Sequence[int]) -> NoSuchTarget:
    return NoSuchTarget(f'no task {" ".join(map(str, roots))}', task=roots[0] if roots else 0)


def _outer_parent(root: int, level: int) -> int:
    """Return the vpid of a root's parent outside of the tree; 0 if it is hidden or not in the root's pid namespace."""
    try:
        parent = read_stat(root).ppid
        return _at(read_status(parent).ns_tgid, level) if parent else 0
    except (ProcessLookupError, PermissionError):       # hidden from us (hidepid= of proc(5))
        return 0


def _scan_process(visit: _Visit, level: int) -> list[Task]:
    """Return the threads of one process, the leader first; empty if it is gone or is not the listed process. Without
    those that the kernel has made for requests of an io_uring: it makes new ones when it needs them."""
    tasks: list[Task] = []
    with suppress(ProcessLookupError, PermissionError):
        for tid in read_threads(visit.tgid):
            task = _scan_task(visit, tid, level)
            # with another parent it is no child of ours: that has died, and another process has its pid
            if task and visit.parent_tgid and task.ppid != visit.parent_tgid:
                return []
            tasks += [task] if task and not task.flags & PF_IO_WORKER else []
    return tasks


def _scan_task(visit: _Visit, tid: int, level: int) -> Task | None:
    try:
        stat = read_stat(visit.tgid, tid)
        vtid, vtgid, vpgid, vsid = _virtual_ids(stat, visit.tgid, level)
    except ProcessLookupError:
        return None
    parent_tid = visit.parent_tid if tid == visit.tgid else visit.tgid
    return Task(tid, visit.tgid, stat.ppid, stat.pgrp, stat.session, vtid, vtgid, visit.vppid, vpgid, vsid, parent_tid,
                stat.start_time, stat.comm, stat.state, visit.depth, stat.flags, stat.exit_signal, stat.exit_code)


def _virtual_ids(stat: Stat, tgid: int, level: int) -> tuple[int, int, int, int]:
    # in the namespace of this /proc the ids are those in stat; reading status takes three times as long
    if level == 0:
        return stat.pid, tgid, stat.pgrp, stat.session
    status = read_status(tgid, stat.pid)
    return (_at(status.ns_pid, level), _at(status.ns_tgid, level), _at(status.ns_pgid, level),
            _at(status.ns_sid, level))


def _at(ids: Sequence[int], level: int) -> int:
    return ids[level] if level < len(ids) else 0


def _children(thread: Task) -> list[int]:
    if thread.is_zombie:            # its children have a new parent
        return []
    try:
        return read_children(thread.tgid, thread.tid)
    except ProcessLookupError:
        return []


# ---------------------------------------------------------------- the hold

class Handles:
    """A pidfd for every process of a tree: `with Handles(tree) as handles`. No pid is reused while its pidfd is open.

    If RLIMIT_NOFILE is too low for the tree, the other processes are identified by start time only (`complete` is
    False).
    """

    SPARE = 256         # fds left for everything else in this process

    def __init__(self, tree: Tree) -> None:
        self._fds: dict[TaskId, int] = {}
        self.gone: list[Task] = []
        self.complete = True
        room = _raise_nofile(len(tree) + self.SPARE) - self.SPARE
        try:
            for task in tree.leaders:
                if len(self._fds) >= room or not self._open(task):
                    self.complete = False
                    break
        except BaseException:
            self.close()
            raise

    def _open(self, task: Task) -> bool:
        try:
            fd = pidfd_open(task.tid)
        except ProcessLookupError:
            self.gone.append(task)
            return True
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return False
            raise
        # the pidfd is that of the pid's present owner; the start time shows whether that is the scanned task
        if is_same(task):
            self._fds[task.id] = fd
        else:
            os.close(fd)
            self.gone.append(task)
        return True

    def __getitem__(self, task: Task) -> int:
        """Return the pidfd of a process; KeyError if there is none (a thread, or the limit was reached)."""
        return self._fds[task.id]

    def __len__(self) -> int:
        return len(self._fds)

    def dead(self, tree: Tree) -> list[Task]:
        """Return processes that have exited since they were scanned, without those that were dead before."""
        alive = tree.alive()
        return [task for task in tree.leaders if task.tgid in alive and self._is_dead(task)]

    def _is_dead(self, task: Task) -> bool:
        fd = self._fds.get(task.id)
        return not is_same(task) if fd is None else wait_dead(fd, 0)

    def send_signal(self, task: Task, sig: int) -> None:
        """Send a signal to exactly this process. Do nothing if it is dead."""
        fd = self._fds.get(task.id)
        with suppress(ProcessLookupError):
            if fd is not None:
                pidfd_send_signal(fd, sig)
            elif is_same(task):     # a stopped tracee keeps its pid until its tracer has seen its death
                os.kill(task.tid, sig)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_same(task: Task) -> bool:
    """Whether the scanned task still has its tid."""
    try:
        return read_stat(task.tgid, task.tid).start_time == task.start_time
    except ProcessLookupError:
        return False


def is_alive(task: Task) -> bool:
    """Whether the scanned task still lives. For a task that was a zombie then, whether it is still there."""
    try:
        stat = read_stat(task.tgid, task.tid)
    except ProcessLookupError:
        return False
    return stat.start_time == task.start_time and (stat.state not in 'ZX' or task.is_zombie)


def _raise_nofile(wanted: int) -> int:
    """Raise the soft limit of open files if needed, at most to the hard one. Return the resulting limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max(soft, wanted)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit

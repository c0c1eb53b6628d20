# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order in which the tasks of an image are made again, as a list of steps. Pure.

Each process is made by the thread that was its parent, with the objects that the two share. Sessions decide the order,
because a process is born into the session of its maker:

    child in the parent's session              made by the parent
    child in the session that the parent left  made by the parent before its setsid(2)
    orphan in the session of a sibling         made by the sibling, with CLONE_PARENT
    orphan in the session of a descendant      made by a child of that descendant, which then dies; the parent is
                                               the subreaper
    member of a session whose leader is dead   made by a ghost: a process of that pid that ends before the start

Process groups are joined when all tasks exist. A dead group leader is a ghost, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from signal import SIGCHLD

from ckptd.errors import Finding
from ckptd.image.reader import ImageTask
from ckptd.image.records import TaskRecord
from ckptd.kernel.clone import (
    CLONE_FILES,
    CLONE_FS,
    CLONE_PARENT,
    CLONE_SIGHAND,
    CLONE_SYSVSEM,
    CLONE_THREAD,
    CLONE_VM,
)
from ckptd.restore.creation_steps import TEMPORARY, CreateTask, Dismiss, JoinGroup, NewSession, Step, Subreaper

SEED = 0                # the maker of the roots, which is not a task of the tree
_DEAD = (ord('Z'), ord('X'))
_SHARES = {'mm_id': CLONE_VM, 'files_id': CLONE_FILES, 'fs_id': CLONE_FS, 'sighand_id': CLONE_SIGHAND}
_OF_THREAD = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM


@dataclass
class NewProcess:
    """A process of the image. alive, ids: its living threads, and the object ids of the first one; both are asked for
    when all threads are known. sid, pgid: the ids that it will have."""
    leader: ImageTask
    threads: list[ImageTask]
    parent: int                 # the thread that has it among its children
    sid: int
    pgid: int
    children: list['NewProcess'] = field(default_factory=list)

    @property
    def vpid(self) -> int:
        return self.leader.vpid

    @cached_property
    def alive(self) -> list[ImageTask]:
        return [task for task in (self.leader, *self.threads) if task.record.state not in _DEAD]

    @cached_property
    def ids(self) -> TaskRecord:
        return (self.alive or [self.leader])[0].record


class CannotMake(Exception):
    """The reason why no order exists."""

    def __init__(self, process: NewProcess, reason: str) -> None:
        super().__init__(reason)
        self.process, self.reason = process, reason


def processes_of(tasks: Sequence[ImageTask]) -> list[NewProcess]:
    """Return processes in depth-first order, each with its children."""
    found: dict[int, NewProcess] = {}
    owner = {task.vpid: task.vtgid for task in tasks}
    for task in tasks:
        if task.is_leader:
            found[task.vpid] = NewProcess(task, [], task.record.parent, task.vsid, task.vpgid)
    for task in tasks:
        if not task.is_leader:
            found[task.vtgid].threads.append(task)
    for process in found.values():
        if process.parent:
            found[owner[process.parent]].children.append(process)
    return list(found.values())


def settle_sessions(processes: Sequence[NewProcess], taken: Mapping[int, str], *, own: bool) -> list[Finding]:
    """Replace sessions and groups whose leaders are outside of the tree and unavailable: the first member leads a new
    one. Return warnings.

    taken: the present user of each pid. own: never join another process's session, because the tree gets a terminal.
    """
    inside = {process.vpid for process in processes}
    warnings = []
    for process in processes:
        outside = process.sid
        if outside in inside or not (own or not outside or outside in taken):
            continue
        group = process.pgid
        for other in processes:
            if other.sid == outside:
                other.sid = process.vpid
            if other.pgid == group and (group not in inside or other is process):
                other.pgid = process.vpid
        if outside in taken:
            warnings.append(_changed(process, f'session {outside}', taken[outside]))
    for process in processes:
        group = process.pgid
        if group not in inside and (not group or group in taken):
            for other in processes:
                other.pgid = process.vpid if other.pgid == group and other.sid == process.sid else other.pgid
            warnings.append(_changed(process, f'group {group}', taken.get(group, 'nobody')))
    return warnings


def _changed(process: NewProcess, what: str, who: str) -> Finding:
    return Finding(process.vpid, process.leader.record.comm, what, 'EEXIST', f'{what} is that of {who} now',
                   'it gets one of its own instead', 'warning')


class CreationOrder:
    """A creation order. `child_of_us`: the roots become our children and not those of the bootstrap, which ends."""

    def __init__(self, processes: Sequence[NewProcess], *, child_of_us: bool) -> None:
        self._processes = {process.vpid: process for process in processes}
        self._order = list(processes)
        self._for_roots = CLONE_PARENT if child_of_us else 0
        self._owner = {task.vpid: process.vpid for process in processes for task in (process.leader, *process.threads)}
        self._records = {task.vpid: task.record for process in processes for task in (process.leader, *process.threads)}
        self._session: dict[int, int] = {SEED: -1}      # of each process that has been made
        self._parent: dict[int, int] = {}               # the thread above it
        self._ghosts: dict[int, int] = {}               # and the process that reaps it
        self._shared: set[tuple[str, int]] = set()      # objects of the tasks that have been made
        self.steps: list[Step] = []

    def plan(self) -> list[Step]:
        """Return all steps. CannotMake."""
        waiting = [process for process in self._order if not process.parent]
        while waiting:
            before, later = len(self._session), self._walk(waiting)
            if later and len(self._session) == before:
                raise CannotMake(later[0], f'session {later[0].sid} cannot be joined: its leader comes after it')
            waiting = later
        self._groups()
        self.steps += [Dismiss(vpid, waiter) for vpid, waiter in reversed(self._ghosts.items())]
        return self.steps

    def _walk(self, processes: Sequence[NewProcess]) -> list[NewProcess]:
        """Make these processes and their descendants, depth first. Return those whose session does not exist yet."""
        later: list[NewProcess] = []
        # a process that begins its session is listed twice: before its early children, and after them
        todo: list[tuple[NewProcess, bool]] = [(process, False) for process in reversed(processes)]
        while todo:
            process, early_made = todo.pop()
            if not early_made:
                if not self._make(process):
                    later.append(process)
                    continue
                self._threads(process)
                if _leads(process):
                    born_into = self._session[process.vpid]
                    early = [child for child in process.children if _birth_session(child) == born_into]
                    todo.append((process, True))
                    todo += [(child, False) for child in reversed(early)]
                    continue
            if _leads(process):
                self.steps.append(NewSession(process.vpid))
                self._session[process.vpid] = process.vpid
            # a child that had to wait may be in `later` already
            todo += [(child, False) for child in reversed(process.children)
                     if child.vpid not in self._session and child not in later]
        return later

    # ------------------------------------------------------------ one process

    def _make(self, process: NewProcess) -> bool:
        above, session = process.parent, _birth_session(process)
        for maker, flags in self._makers(above, session):
            shares = self._shares(process.ids, maker)
            if shares is not None:
                self._spawn(process, maker, flags | shares, session)
                return True
        if session is None or session == self._session[self._owner.get(above, SEED)] or session in self._ghosts:
            raise CannotMake(process, 'it shares memory, files, directories or signal handlers with a process that is'
                                      ' neither its parent nor a sibling')
        if maker := self._below(above, session):
            self._spawn_orphan(process, maker, session)
            return True
        if session in self._processes:
            return False
        self._ghost(session, above)
        self.steps.append(NewSession(session))
        self._session[session] = session
        return self._make(process)

    def _makers(self, above: int, session: int | None) -> Iterator[tuple[int, int]]:
        """Yield tasks in the session that can make a child of `above`, with the flag for that."""
        if session is None or self._session[self._owner.get(above, SEED)] == session:
            yield above, self._for_roots if above == SEED else 0
        for vpid, other in self._session.items():
            if (session is None or other == session) and vpid != SEED and self._parent[vpid] == above:
                yield vpid, CLONE_PARENT

    def _shares(self, ids: TaskRecord, maker: int) -> int | None:
        """Return CLONE_* for the objects that the two share. None if the task shares an object with another task but
        not with `maker`."""
        record, flags = self._records.get(maker), 0
        for name, flag in _SHARES.items():
            number = getattr(ids, name)
            if number and record is not None and getattr(record, name) == number:
                flags |= flag
            elif (name, number) in self._shared:
                return None
        # the kernel has no shared handlers without shared memory
        return flags if flags & CLONE_VM else flags & ~CLONE_SIGHAND

    def _spawn(self, process: NewProcess, maker: int, flags: int, session: int | None) -> None:
        # with CLONE_PARENT a child has the exit signal of its maker (clone(2))
        signal = 0 if flags & CLONE_PARENT else process.leader.record.exit_signal & 0xFF
        self.steps.append(CreateTask(process.vpid, maker, flags, signal))
        self._session[process.vpid] = self._session[self._owner.get(maker, maker)] if session is None else session
        self._parent[process.vpid] = process.parent
        self._note(process.ids)

    def _spawn_orphan(self, process: NewProcess, maker: int, session: int) -> None:
        """Make a grandchild of the maker whose parent dies, so that it becomes a child of the subreaper above."""
        reaper = self._owner.get(process.parent, SEED)
        if self._shares(process.ids, SEED) is None:
            raise CannotMake(process, 'an orphan that shares with others cannot be made')
        self.steps += [Subreaper(reaper, True), CreateTask(0, maker),
                       CreateTask(process.vpid, TEMPORARY, 0, process.leader.record.exit_signal & 0xFF),
                       Dismiss(TEMPORARY, maker), Subreaper(reaper, False)]
        self._session[process.vpid], self._parent[process.vpid] = session, process.parent
        self._note(process.ids)

    def _below(self, above: int, session: int) -> int:
        """Return a process in the session that descends from `above`; 0 if there is none. The bootstrap cannot adopt
        orphans."""
        for vpid, other in self._session.items():
            at = vpid
            while other == session and at in self._parent:
                at = self._owner.get(self._parent[at], self._parent[at])
                if above != SEED and at == self._owner[above]:
                    return vpid
        return 0

    def _ghost(self, vpid: int, above: int) -> None:
        flags = self._for_roots if above == SEED else 0
        self.steps.append(CreateTask(vpid, above, flags, 0 if flags else SIGCHLD))
        self._ghosts[vpid] = above
        self._parent[vpid] = above
        self._session[vpid] = self._session[self._owner.get(above, above)]

    def _note(self, ids: TaskRecord) -> None:
        self._shared |= {(name, getattr(ids, name)) for name in _SHARES if getattr(ids, name)}

    def _threads(self, process: NewProcess) -> None:
        made = [process.leader]
        for thread in process.threads:
            record = thread.record
            maker = next((one for one in made if _same(one.record, record, 'files_id') and
                          _same(one.record, record, 'fs_id')), process.leader)
            # the maker is a dead leader, which was made with the objects of its threads
            ids = process.ids if maker is process.leader else maker.record
            flags = _OF_THREAD | (CLONE_FILES if _same(ids, record, 'files_id') else 0) | (
                CLONE_FS if _same(ids, record, 'fs_id') else 0)
            self.steps.append(CreateTask(thread.vpid, maker.vpid, flags))
            self._note(record)
            made.append(thread)

    # ------------------------------------------------------------ groups

    def _groups(self) -> None:
        joined: set[int] = set()
        for process in sorted(self._order, key=lambda one: one.pgid != one.vpid):
            group = process.pgid
            if process.sid == process.vpid:     # a session leader leads its group and may not leave it
                continue
            if group != process.vpid and group not in self._processes and group not in self._ghosts:
                self._ghost(group, process.vpid)
                self.steps.append(JoinGroup(group, group))
            joined.add(process.vpid)
            self.steps.append(JoinGroup(process.vpid, group))


def _leads(process: NewProcess) -> bool:
    return process.sid == process.vpid


def _birth_session(process: NewProcess) -> int | None:
    """Return the session that it must be born into. None: any, as it begins its own and no child needs another."""
    if not _leads(process):
        return process.sid
    others = {one.sid for one in process.children if one.sid != process.vpid and not _leads(one)}
    # a session that a descendant leads cannot be the one it was born into
    return min(others - {one.vpid for one in _descendants(process)}, default=None) if others else None


def _descendants(process: NewProcess) -> Iterator[NewProcess]:
    """Yield the process itself and all its descendants."""
    todo = [process]
    while todo:
        one = todo.pop()
        yield one
        todo += one.children


def _same(one: TaskRecord, other: TaskRecord, name: str) -> bool:
    return bool(getattr(one, name) == getattr(other, name))

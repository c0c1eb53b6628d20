# SPDX-License-Identifier: LGPL-2.1-or-later
"""Task and Tree: the picture of a process tree, and the order in which its tasks are created again. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class TaskId(NamedTuple):
    """What makes a task itself and no later one with the same number: tid and start time (clock ticks since boot)."""
    tid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel task. tid, tgid, ... as the daemon sees them; vtid, vtgid, ... as the root's pid namespace does.

    parent_tid: the thread that has this task in its children list (0 for a root; for a thread, its leader).
    state: the letter of /proc/PID/stat. flags: PF_* of the same line. exit_code: wait(2) status of a zombie.
    """
    tid: int
    tgid: int
    ppid: int
    pgid: int
    sid: int
    vtid: int
    vtgid: int
    vppid: int
    vpgid: int
    vsid: int
    parent_tid: int
    start_time: int
    comm: str
    state: str
    depth: int
    flags: int = 0
    exit_signal: int = 17
    exit_code: int = 0

    @property
    def id(self) -> TaskId:
        return TaskId(self.tid, self.start_time)

    @property
    def is_leader(self) -> bool:
        return self.tid == self.tgid

    @property
    def is_zombie(self) -> bool:
        return self.state in 'ZX'


@dataclass(frozen=True, slots=True)
class Tree:
    """Tasks in depth-first order: a leader, its other threads by tid, then the children of each thread in turn.

    Creating processes in this order finds every parent alive before its child is made. unseen: there are tasks besides
    that /proc does not show us.
    """
    tasks: tuple[Task, ...]
    unseen: bool = False
    _by_tid: dict[int, Task] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, '_by_tid', {task.tid: task for task in self.tasks})

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __contains__(self, tid: int) -> bool:
        return tid in self._by_tid

    def __getitem__(self, tid: int) -> Task:
        return self._by_tid[tid]

    @property
    def root(self) -> Task:
        return self.tasks[0]

    @property
    def leaders(self) -> list[Task]:
        return [task for task in self.tasks if task.is_leader]

    def threads(self, tgid: int) -> list[Task]:
        """All tasks of one thread group, the leader first."""
        return [task for task in self.tasks if task.tgid == tgid]

    def alive(self) -> frozenset[int]:
        """tgids of the processes that have a living thread; the leader may have exited before it."""
        return frozenset(task.tgid for task in self.tasks if not task.is_zombie)

    @property
    def ids(self) -> frozenset[TaskId]:
        return frozenset(task.id for task in self.tasks)

    def changes(self, later: 'Tree') -> list[str]:
        """What a later scan of the same tree has more and less, one sentence a task; empty when nothing changed."""
        before, after = self.ids, later.ids
        gone = [f'{task.comm}[{task.tid}] is gone' for task in self.tasks if task.id not in after]
        born = [f'{task.comm}[{task.tid}] is new' for task in later.tasks if task.id not in before]
        return gone + born

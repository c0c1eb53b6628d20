# SPDX-License-Identifier: LGPL-2.1-or-later
"""Task and Tree: the tasks of a process tree, in the order in which a restart creates them. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class TaskId(NamedTuple):
    """The identity of a task: tid and start time (clock ticks since boot). A later task with the same tid differs."""
    tid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class Task:
    """One kernel task. tid, tgid, ... are as the daemon sees them; vtid, vtgid, ... as the root's pid namespace
    does."""
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
    parent_tid: int    # thread that has this task in its children list; 0 for a root; for a thread, its leader
    start_time: int
    comm: str
    state: str            # letter of /proc/PID/stat
    depth: int
    flags: int = 0        # PF_* of /proc/PID/stat
    exit_signal: int = 17
    exit_code: int = 0    # wait(2) status of a zombie

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

    Creating processes in this order finds every parent alive before its child is made.
    """
    tasks: tuple[Task, ...]
    unseen: bool = False    # some tasks are hidden from this process in /proc
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
        """Return all tasks of one thread group, the leader first."""
        return [task for task in self.tasks if task.tgid == tgid]

    def alive(self) -> frozenset[int]:
        """Return the tgids of the processes that have a living thread. The leader may have exited before that
        thread."""
        return frozenset(task.tgid for task in self.tasks if not task.is_zombie)

    @property
    def ids(self) -> frozenset[TaskId]:
        return frozenset(task.id for task in self.tasks)

    def changes(self, later: 'Tree') -> list[str]:
        """Describe how a later scan of the same tree differs, one sentence for each task. Empty if nothing changed."""
        before, after = self.ids, later.ids
        gone = [f'{task.comm}[{task.tid}] is gone' for task in self.tasks if task.id not in after]
        born = [f'{task.comm}[{task.tid}] is new' for task in later.tasks if task.id not in before]
        return gone + born

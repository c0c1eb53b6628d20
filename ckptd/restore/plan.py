# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a restart as data: made once, shown by a dry run, carried out by run.py."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from ckptd.errors import Finding
from ckptd.image.reader import ImageReader, ImageTask
from ckptd.image.records import FdTable, ProcessState
from ckptd.inspect.checks import CallerRights
from ckptd.inspect.checks.hidden import ANOTHER, sees_all
from ckptd.kernel.numbers import Numbers, await_reaped, numbers_in_use
from ckptd.objects.namespaces.birth import BirthNamespaces
from ckptd.remote.stub import Arena
from ckptd.restore.bootstrap import find_arena
from ckptd.restore.cow_sharing import CowSharing
from ckptd.restore.creation_order import CannotMake, CreationOrder, NewProcess, processes_of, settle_sessions
from ckptd.restore.creation_steps import CreateTask, Step
from ckptd.restore.fill_order import with_fills
from ckptd.restore.memory import mapped_ranges

DEAD = (ord('Z'), ord('X'))
_REAPED_WITHIN = 3.0        # seconds


@dataclass(frozen=True)
class Plan:
    """The plan."""
    namespaces: BirthNamespaces                         # namespaces to be born into
    processes: list[NewProcess]                         # in depth-first order
    steps: list[Step]                                   # steps that make the tasks
    arena: Arena                                        # place of the stubs' code
    highest: int                                        # the highest fd of any table
    refusals: list[Finding] = field(default_factory=list)  # reasons against the restart, and warnings
    # mm_id of the maker's address space that is inherited with its pages, by mm_id of the child's
    origins: dict[int, int] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> list[ImageTask]:
        """All tasks, in the order of the image."""
        return [task for process in self.processes for task in (process.leader, *process.threads)]

    @cached_property
    def alive(self) -> list[ImageTask]:
        return [task for task in self.tasks if task.record.state not in DEAD]

    @property
    def numbers(self) -> set[int]:
        """Every pid that is needed, including those of ghosts."""
        return {step.vpid for step in self.steps if isinstance(step, CreateTask) and step.vpid > 0}

    def users(self, name: str) -> dict[int, int]:
        """Return the first living task that uses each object of 'mm_id', 'files_id', 'fs_id' or 'sighand_id': vpid by
        id."""
        found: dict[int, int] = {}
        for task in self.alive:
            found.setdefault(getattr(task.record, name), task.vpid)
        return found


def is_users_worker(plan: Plan) -> bool:
    """Whether the tree is made by a worker that is an ordinary user and chooses pids by CAP_CHECKPOINT_RESTORE."""
    return os.geteuid() != 0 and not plan.namespaces.user


def read_numbers(reader: ImageReader, namespaces: BirthNamespaces, caller: CallerRights) -> Numbers:
    """Read the users of pids in the namespace of the tree. A caller from whom /proc hides processes gets no names. Dead
    processes that hold a wanted pid get a moment to be reaped."""
    if namespaces.pid:
        return {}
    # including the dead that sessions and groups are named by
    wanted = {number for task in reader.tasks for number in (task.vpid, task.vpgid, task.vsid)} - {0}
    await_reaped(wanted, time.monotonic() + _REAPED_WITHIN)
    found = numbers_in_use()
    return found if sees_all(caller) else dict.fromkeys(found, ANOTHER)


def make_plan(reader: ImageReader, namespaces: BirthNamespaces, numbers: Numbers, *, own_session: bool,
              child_of_us: bool) -> Plan:
    """Make the plan. numbers: the user of each pid; empty in a new pid namespace. own_session: the tree gets a
    terminal."""
    processes = processes_of(reader.tasks)
    had_terminal = any(state.tty for state in reader.every(ProcessState))
    refusals = settle_sessions(processes, numbers, own=own_session and had_terminal)
    # the first process of a namespace makes its roots itself, and cannot make a sibling (CLONE_PARENT is EINVAL)
    has_init = any(process.vpid == 1 for process in processes)
    child_of_us = child_of_us and (not namespaces.pid or (has_init and not namespaces.bootstrap_is_init))
    roots = [process for process in processes if not process.parent]
    if namespaces.bootstrap_is_init and has_init and len(roots) > 1:
        refusals.append(Finding(roots[1].vpid, '', 'pid namespace', 'EOPNOTSUPP', 'has a parent outside of its pid '
                                'namespace, whose process 1 is in the tree', 'restore as root'))
    if not any(process.alive for process in processes):
        refusals.append(Finding(0, '', 'image', 'ESRCH', 'every task of the tree had ended, so nothing can run',
                                'checkpoint a living tree'))
    steps: list[Step] = []
    try:
        steps = CreationOrder(processes, child_of_us=child_of_us).plan()
    except CannotMake as error:
        refusals.append(Finding(error.process.vpid, error.process.leader.record.comm, 'task', 'EOPNOTSUPP',
                                error.reason, 'checkpoint a tree without it'))
    highest = max((fd.fd for table in reader.every(FdTable) for fd in table.fds), default=2)
    steps, origins = with_fills(steps, _mms(processes), lambda theirs, mine: bool(
        CowSharing(reader.memory(theirs), reader.memory(mine)).kept))
    plan = Plan(namespaces, processes, steps, find_arena(mapped_ranges(reader)), highest, refusals, origins)
    refusals += [Finding(vpid, '', f'pid {vpid}', 'EEXIST', f'the pid is in use by {numbers[vpid]}',
                         'end that process, or restore with --new-pidns')
                 for vpid in sorted(plan.numbers & numbers.keys())]
    return plan


def _mms(processes: Iterable[NewProcess]) -> dict[int, int]:
    """Return the mm_id of each task that has memory. A dead leader of living threads is born with theirs."""
    return {task.vpid: process.ids.mm_id for process in processes for task in (process.leader, *process.threads)
            if process.ids.mm_id}

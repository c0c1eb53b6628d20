# SPDX-License-Identifier: LGPL-2.1-or-later
"""The order of creation, checked by a model of what fork, setsid, setpgid and death do."""

from dataclasses import dataclass, field

import pytest

from ckptd.image.reader import ImageTask
from ckptd.image.records import TaskRecord
from ckptd.kernel.clone import CLONE_FILES, CLONE_PARENT, CLONE_THREAD, CLONE_VM
from ckptd.restore.creation_order import SEED, CannotMake, CreationOrder, processes_of, settle_sessions
from ckptd.restore.creation_steps import CreateTask, Dismiss, JoinGroup, NewSession, Step, Subreaper


def task(vpid: int, parent: int, sid: int, pgid: int, *, vtgid: int = 0, mm: int = 0, files: int = 0,
         state: str = 'S') -> ImageTask:
    """A task with everything of its own, unless it is said."""
    record = TaskRecord(vpid, parent, f't{vpid}', ord(state), 0, 17, 0, 0, mm or 1000 + vpid, files or 1000 + vpid,
                        1000 + vpid, 1000 + vpid, '')
    return ImageTask(vpid, vtgid or vpid, parent, pgid, sid, record)


@dataclass
class Machine:
    """What the kernel would do."""
    parent: dict[int, int] = field(default_factory=lambda: {SEED: -1})
    session: dict[int, int] = field(default_factory=lambda: {SEED: 1})
    group: dict[int, int] = field(default_factory=lambda: {SEED: 1})
    subreapers: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    process: dict[int, int] = field(default_factory=dict)       # of a thread

    def take(self, step: Step) -> None:
        match step:
            case CreateTask(vpid, maker, flags, _) if flags & CLONE_THREAD:
                assert maker in self.parent or maker in self.process
                self.process[vpid] = maker
            case CreateTask(vpid, maker, flags, _):
                vpid, of = vpid or -1, self.process.get(maker, maker)
                self.parent[vpid] = self.parent[maker] if flags & CLONE_PARENT else maker
                self.session[vpid], self.group[vpid] = self.session[of], self.group[of]
            case NewSession(vpid):
                assert self.group[vpid] != vpid, 'a group leader cannot begin a session'
                self.session[vpid] = self.group[vpid] = vpid
            case JoinGroup(vpid, vpgid):
                assert vpgid == vpid or any(self.group[other] == vpgid and self.session[other] == self.session[vpid]
                                            for other in self.session if other not in self.dead), 'no such group'
                self.group[vpid] = vpgid
            case Subreaper(vpid, on):
                (self.subreapers.add if on else self.subreapers.discard)(vpid)
            case Dismiss(vpid, _):
                self.dead.add(vpid)
                for child, above in self.parent.items():
                    if above == vpid and child not in self.dead:
                        self.parent[child] = self._reaper(vpid)

    def _reaper(self, vpid: int) -> int:
        above = self.parent[vpid]
        while above not in (SEED, -1) and (above in self.dead or above not in self.subreapers):
            above = self.parent[above]
        return above


def made(*tasks: ImageTask) -> tuple[Machine, list[Step]]:
    machine, steps = Machine(), CreationOrder(processes_of(tasks), child_of_us=False).plan()
    for step in steps:
        machine.take(step)
    for one in tasks:
        if one.is_leader:
            above = one.record.parent
            assert machine.parent[one.vpid] == above
            assert (machine.session[one.vpid], machine.group[one.vpid]) == (one.vsid, one.vpgid)
    assert machine.dead >= machine.session.keys() - {SEED} - {one.vpid for one in tasks}, 'a ghost lives'
    return machine, steps


def test_plain_tree() -> None:
    made(task(10, 0, 10, 10), task(11, 10, 10, 10), task(12, 11, 10, 12))


def test_child_of_the_session_that_its_parent_left() -> None:
    """Forked before setsid."""
    made(task(10, 0, 10, 10), task(11, 10, 11, 11), task(12, 11, 10, 10), task(13, 11, 11, 13))


def test_session_whose_leader_is_dead() -> None:
    _, steps = made(task(10, 0, 7, 10), task(11, 10, 7, 11))
    assert sum(isinstance(step, Dismiss) for step in steps) == 1


def test_group_whose_leader_is_dead() -> None:
    made(task(10, 0, 10, 10), task(11, 10, 10, 9), task(12, 10, 10, 9))


def test_orphan_in_the_session_of_a_sibling() -> None:
    made(task(10, 0, 10, 10), task(11, 10, 11, 11), task(12, 10, 11, 12))


def test_orphan_in_the_session_of_a_nephew() -> None:
    """Its parent, a child of that session's leader, died; the root takes it in."""
    made(task(10, 0, 10, 10), task(11, 10, 10, 11), task(12, 11, 12, 12), task(13, 10, 12, 13))


def test_leader_that_comes_later() -> None:
    made(task(10, 0, 10, 10), task(11, 10, 12, 11), task(12, 10, 12, 12))


def test_orphan_of_a_dead_session_below_a_leader() -> None:
    made(task(10, 0, 10, 10), task(11, 10, 8, 8))


def test_threads_and_their_children() -> None:
    machine, _ = made(task(10, 0, 10, 10, mm=5, files=6), task(11, 10, 10, 10, vtgid=10, mm=5, files=6),
                      task(12, 11, 10, 10))
    assert machine.parent[12] == 11


def test_shared_memory_and_files() -> None:
    _, steps = made(task(10, 0, 10, 10, mm=5), task(11, 10, 10, 10, mm=5, files=6), task(12, 10, 10, 10, files=6))
    flags = {step.vpid: step.flags for step in steps if isinstance(step, CreateTask)}
    assert flags[11] & CLONE_VM
    assert flags[12] & CLONE_FILES
    assert flags[12] & CLONE_PARENT     # it shares with its sibling, not with its parent


def test_sharing_with_a_cousin_has_no_order() -> None:
    with pytest.raises(CannotMake, match='shares memory'):
        CreationOrder(processes_of([task(10, 0, 10, 10), task(11, 10, 10, 10), task(12, 11, 10, 10, files=6),
                                    task(13, 10, 10, 10, files=6)]), child_of_us=False).plan()


def test_outside_sessions_that_are_taken() -> None:
    """The root leads the session and the group instead, and everybody hears of it once."""
    processes = processes_of([task(10, 0, 7, 7), task(11, 10, 7, 7), task(12, 10, 7, 12)])
    warnings = settle_sessions(processes, {7: 'bash[7]'}, own=False)
    assert [(one.sid, one.pgid) for one in processes] == [(10, 10), (10, 10), (10, 12)]
    assert [(row.pid, row.severity, 'bash[7]' in row.reason) for row in warnings] == [(10, 'warning', True)]


def test_outside_sessions_that_are_free_stay() -> None:
    processes = processes_of([task(10, 0, 7, 7)])
    assert settle_sessions(processes, {}, own=False) == []
    assert processes[0].sid == 7


def test_a_chain_of_five_thousand() -> None:
    chain = [task(10, 0, 10, 10), *(task(pid, pid - 1, 10, 10) for pid in range(11, 5010))]
    steps = CreationOrder(processes_of(chain), child_of_us=False).plan()
    assert sum(isinstance(step, CreateTask) for step in steps) == 5000

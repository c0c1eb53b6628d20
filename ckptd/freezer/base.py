# SPDX-License-Identifier: LGPL-2.1-or-later
"""Common parts of all freezers: the terms of a freeze, and a frozen tree with the way back."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from ckptd.errors import CkptError, Finding, FreezeTimeout, InvalidArgument
from ckptd.journal.actions import Actions, FaultPoint, describe, undo_all
from ckptd.journal.entry import JournalEntry
from ckptd.journal.steps import AnyStep, EndProcesses, FreezeCgroup, FreezeUnit, Known
from ckptd.journal.store import Journal
from ckptd.kernel.ptrace import Tracee, let_go
from ckptd.kernel.wchan import read_wchan
from ckptd.tree import Task, Tree

# names of a freezer's sleep in wchan (older kernels have do_freezer_trap inlined), and of a parent in vfork(2), which
# sleeps in state D and yet counts as frozen: kernel/signal.c and wait_for_vfork_done in kernel/fork.c
RESTING = ('do_freezer_trap', 'get_signal', 'ptrace_stop', 'do_signal_stop', 'kernel_clone', 'wait_for_vfork_done')
MAX_NAMED = 64              # tasks that an error names


class FreezeTarget(Protocol):
    """The fields of inspect.scan.Target that a freezer needs. cgroup: the tree is everything in it, if not None."""
    @property
    def cgroup(self) -> str | None: ...
    @property
    def unit(self) -> str | None: ...
    @property
    def description(self) -> str: ...


@dataclass(frozen=True, slots=True)
class FreezeRequest:
    """The parameters of a freeze.

    deadline: of time.monotonic(). journal: None where there are tracees to let go of and nothing else. rescan: scans
    the tree again. also: an fd that ends a wait early when readable; `check` is called then and between rounds, reads
    what is there, and raises Cancelled if that is what it says.
    remote_calls: the tree must be able to run for its tracer (let_run), so no cgroup that was found frozen may hold it.
    at: called with the name of each fault point.
    """
    target: FreezeTarget
    deadline: float
    journal: Journal | None
    actions: Actions
    rescan: Callable[[], Tree]
    job: int
    also: int | None
    check: Callable[[], None]
    remote_calls: bool
    at: FaultPoint

    def next_round(self) -> None:
        """Between two rounds of catching up with a tree that forks: Cancelled, or FreezeTimeout."""
        self.check()
        if time.monotonic() >= self.deadline:
            raise FreezeTimeout(f'{self.target.description} forks faster than it can be frozen', phase='freeze')


class CannotFreezeError(Exception):
    """This freezer cannot, another one may. Says why; nothing is left changed."""


class FrozenTree:
    """A tree at rest, and what it takes to bring back the state that was found. This one was at rest already.

        tree        as scanned last, with every task at rest
        tracees     by tid; stopped under ptrace. The ptrace freezer fills it, a dump adds its own; all of them are
                    detached at the end, after the state found is back, so what was found frozen never runs in between
        rescan()    the tree as it is now
        let_run()   thaw, so that tracees can run remote system calls; needs every thread to be stopped under ptrace
        hold()      freeze again what let_run has thawed
        condemn()   freeze it again to be ended: who undoes the freeze from here on, a recovery too, ends the tree
        restore()   bring back the state that was found; the tracees stay stopped
        close()     restore, then let the tracees go
    """
    mode: str = 'caller'

    def __init__(self, tree: Tree, freeze_request: FreezeRequest) -> None:
        self.tree = tree
        self.tracees: dict[int, Tracee] = {}
        self._freeze_request = freeze_request
        self._entry: JournalEntry | None = None

    @property
    def moved(self) -> bool:
        """The tree is in another cgroup than it was found in."""
        return False

    def freeze(self) -> None:
        """Bring the tree to rest. CannotFreezeError, FreezeTimeout, TreeChanged, Cancelled: then `close` undoes it."""

    def rescan(self) -> Tree:
        """The tree as it is now, wherever the freeze has put it."""
        return self._freeze_request.rescan()

    def let_run(self) -> None:
        """CkptError if the system does not let us."""
        for number, step in self._brakes():
            self._freeze_request.at(f'let-run-{step.point}')
            try:
                self._freeze_request.actions.undo(step, {})
            except OSError as error:
                raise CkptError(f'cannot undo {describe(step)}: {error.strerror}', errno=error.errno) from error
            self._journal().undone(number)
            self._freeze_request.at(f'let-run-{step.point}-done')

    def hold(self) -> None:
        """CkptError if the system does not let us; FreezeTimeout. Nothing where let_run had nothing to thaw."""
        for number, step in self._entry.released() if self._entry else ():
            self._journal().redone(number)
            self._freeze_request.at(f'hold-{step.point}')
            try:
                self._freeze_request.actions.take(step)
            except OSError as error:
                raise CkptError(f'{describe(step)}: {error.strerror}', errno=error.errno) from error
            self._freeze_request.at(f'hold-{step.point}-done')

    def condemn(self) -> None:
        """Write down all processes before the first one is killed, so that a recovery never leaves half a tree.
        CkptError.

        A worker that is an ordinary user and freezes by ptrace has no journal, and writes nothing.
        """
        FrozenTree.hold(self)       # what is stopped need not be waited for
        self._write_end()

    def restore(self) -> None:
        """Bring back the state that was found; a second call does nothing. CkptError if a step cannot be undone: the
        journal keeps it for a recovery."""
        if self._entry is None or self._entry.closed:
            return
        try:
            failures = undo_all(self._entry, self._freeze_request.actions, self._freeze_request.at)
        finally:
            self._entry.close()
        if failures:
            raise CkptError('; '.join(failures), phase='release', hint='the daemon tries again when it starts')

    def close(self) -> None:
        try:
            self.restore()
        finally:
            self.let_go()

    def let_go(self) -> None:
        let_go(self.tracees.values())
        self.tracees.clear()

    # ------------------------------------------------------------ for freezers

    def _journal(self) -> JournalEntry:
        if self._entry is None:
            freeze_request = self._freeze_request
            if freeze_request.journal is None:
                raise RuntimeError('a freeze that changes cgroups needs a journal')
            self._entry = freeze_request.journal.begin(freeze_request.job, freeze_request.target.description, self.mode)
            freeze_request.at('freeze-begin')
        return self._entry

    def _take(self, step: AnyStep) -> None:
        """Write the step down, then take it. CannotFreezeError if the system does not let us."""
        try:
            self._journal().add(step)
            self._freeze_request.at(f'freeze-{step.point}')
            self._freeze_request.actions.take(step)
        except OSError as error:
            raise CannotFreezeError(f'{describe(step)}: {error.strerror or error}') from error
        self._freeze_request.at(f'freeze-{step.point}-done')

    def _write_end(self) -> None:
        if self._freeze_request.journal is not None:
            alive = self.tree.alive()
            self._journal().add(EndProcesses(tuple(Known(task.tgid, task.start_time) for task in self.tree.leaders
                                                   if task.tgid in alive)))

    def _brakes(self) -> list[tuple[int, FreezeCgroup | FreezeUnit]]:
        """Steps that keep the tree from running, newest first."""
        standing = self._entry.standing() if self._entry else []
        return [(number, step) for number, step in standing if isinstance(step, FreezeCgroup | FreezeUnit)]


def nothing_to_check() -> None:
    """The `check` of those who have no control socket."""


def refuse_own_tree(tree: Tree) -> None:
    """A process that freezes itself can thaw nothing any more."""
    if os.getpid() in tree:
        raise InvalidArgument('the tree holds the process that would freeze it', task=os.getpid(), phase='freeze',
                              hint='name a smaller target')


def timed_out(tasks: list[Task], what: str) -> NoReturn:
    """FreezeTimeout that names these tasks, each with its state and where it sleeps."""
    rows = [_row(task, what) for task in tasks[:MAX_NAMED]]
    if not rows:
        raise FreezeTimeout('the tree did not come to rest in time', phase='freeze')
    more = f' (and {len(tasks) - 1} more)' if len(tasks) > 1 else ''
    first = rows[0]
    raise FreezeTimeout(f'{first.comm}[{first.pid}] {first.reason}{more}', task=first.pid, resource=first.resource,
                        phase='freeze', refusals=rows)


def restless(tree: Tree) -> list[Task]:
    """Tasks that keep a cgroup from being frozen. The kernel does not tell them, but shows where they sleep."""
    awake = [task for task in tree if task.state not in 'TtZXx' and _place(task) not in RESTING]
    # without wchan a frozen task looks like any that sleeps; one in D or R is not frozen for certain
    return [task for task in awake if task.state in 'DR'] or awake


def _row(task: Task, what: str) -> Finding:
    where = _place(task)
    reason = f'{what}: state {task.state}' + (f', sleeps in {where}' if where else '')
    return Finding(task.tid, task.comm, f'state {task.state}', 'ETIMEDOUT', reason, FreezeTimeout.default_hint)


def _place(task: Task) -> str:
    try:
        return read_wchan(task.tgid, task.tid)
    except ProcessLookupError:
        return ''

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Common parts of all freezers: the parameters of a freeze, and a frozen tree with the means to restore it."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Protocol, Self

from ckptd.errors import CkptError, Finding, FreezeTimeout, InvalidArgument, NoSuchTarget
from ckptd.inspect.scan import scan_tree
from ckptd.journal.entry import FaultPoint, JournalEntry
from ckptd.journal.steps import AnyStep, EndProcesses, Known, StepContext
from ckptd.journal.store import Journal
from ckptd.kernel.ptrace import Tracee, let_go
from ckptd.kernel.wchan import read_wchan
from ckptd.tree import Task, Tree

# Functions in wchan of a task that is frozen (older kernels have do_freezer_trap inlined), or that waits for its child
# in vfork(2). The latter is in state D and yet counts as frozen (kernel/signal.c, and wait_for_vfork_done in
# kernel/fork.c).
RESTING = ('do_freezer_trap', 'get_signal', 'ptrace_stop', 'do_signal_stop', 'kernel_clone', 'wait_for_vfork_done')
MAX_NAMED = 64              # tasks that an error names


class FreezeTarget(Protocol):
    """The fields of inspect.scan.ResolvedTarget that a freezer needs. cgroup: if not None, the tree is everything in
    it."""
    @property
    def cgroup(self) -> str | None: ...
    @property
    def unit(self) -> str | None: ...
    @property
    def description(self) -> str: ...


@dataclass(frozen=True, slots=True)
class FreezeRequest:
    """The parameters of a freeze."""
    target: FreezeTarget
    deadline: float               # of time.monotonic()
    journal: Journal | None       # None if there are only tracees to detach from
    context: StepContext
    rescan: Callable[[], Tree]    # scans the tree again
    job: int
    also: int | None              # an fd that ends a wait early when readable
    check: Callable[[], None]     # called when `also` is readable and between rounds; reads the message, and raises
                                  # Cancelled if it is one
    remote_calls: bool            # the tree must be able to run for its tracer (let_run), so a cgroup that was found
                                  # frozen must not hold it
    at: FaultPoint                # called with the name of each fault point

    def next_round(self) -> None:
        """Check the limits between two rounds of catching up with a tree that forks: Cancelled, or FreezeTimeout."""
        self.check()
        if time.monotonic() >= self.deadline:
            raise FreezeTimeout(f'{self.target.description} forks faster than it can be frozen', phase='freeze')


class CannotFreezeError(Exception):
    """Failure of one freezer, where another one may succeed. The message gives the reason. Nothing is left
    changed."""


class FrozenTree:
    """A tree at rest, and the means to restore the state that was found. This class is for a tree that was already at
    rest.

        tree        as scanned last, with every task at rest
        tracees     by tid; stopped under ptrace. The ptrace freezer fills it, a dump adds its own. All of them are
                    detached at the end, after the state is restored, so a tree found frozen never runs in between
        rescan()    scan the tree again
        let_run()   thaw, so that tracees can run remote system calls; every thread must be stopped under ptrace
        hold()      freeze again after let_run
        condemn()   freeze it again to be ended: from here on an undo of the freeze, also by a recovery, ends the tree.
                    With `again` false it is not frozen, because its tasks exit themselves
        restore()   restore the state that was found; the tracees stay stopped
        close()     restore, then detach from the tracees; the end of a `with` does it
    """
    mode: str = 'caller'

    def __init__(self, tree: Tree, freeze_request: FreezeRequest) -> None:
        self.tree = tree
        self.tracees: dict[int, Tracee] = {}
        self._freeze_request = freeze_request
        self._entry: JournalEntry | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self.close_after(error)

    @property
    def moved(self) -> bool:
        """Whether the tree is in a cgroup outside of the requested one."""
        return False

    def freeze(self) -> None:
        """Bring the tree to rest. CannotFreezeError, FreezeTimeout, TreeChanged, Cancelled: then `close` undoes it."""

    def rescan(self) -> Tree:
        """Scan the tree again, wherever the freeze has moved it."""
        if not self.moved:
            return self._freeze_request.rescan()
        # once moved, the tree is no longer in the requested cgroup, but its roots are known
        roots = [task.tid for task in self.tree.leaders if not task.depth]
        # except for orphans that an earlier scan has missed
        with suppress(NoSuchTarget):
            roots += [task.tid for task in self._freeze_request.rescan().leaders
                      if not task.depth and task.tid not in roots]
        return scan_tree(roots)

    def let_run(self) -> None:
        """Thaw the tree, with its tasks stopped. CkptError if that fails."""
        for number, step in self._brakes():
            self._freeze_request.at(f'let-run-{step.point}')
            try:
                step.undo(self._freeze_request.context, {})
            except OSError as error:
                raise CkptError(f'cannot undo {step.describe()}: {error.strerror}', errno=error.errno) from error
            self._journal().undone(number)
            self._freeze_request.at(f'let-run-{step.point}-done')

    def hold(self) -> None:
        """Freeze the tree again after let_run. CkptError if that fails; FreezeTimeout. Do nothing if let_run thawed
        nothing."""
        for number, step in self._entry.released() if self._entry else ():
            self._journal().redone(number)
            self._freeze_request.at(f'hold-{step.point}')
            try:
                step.take(self._freeze_request.context)
            except OSError as error:
                raise CkptError(f'{step.describe()}: {error.strerror}', errno=error.errno) from error
            self._freeze_request.at(f'hold-{step.point}-done')

    def condemn(self, *, again: bool = True) -> None:
        """Write down all processes before the first one is killed, so that a recovery never leaves half a tree.
        CkptError. again: freeze the tree before."""
        if again:
            FrozenTree.hold(self)       # tasks that are stopped need no wait
        self._write_end()

    def restore(self) -> None:
        """Restore the state that was found. A second call does nothing. CkptError if a step cannot be undone; the
        journal keeps it for a recovery."""
        if self._entry is None or self._entry.closed:
            return
        try:
            failures = self._entry.undo(self._freeze_request.context, self._freeze_request.at)
        finally:
            self._entry.close()
        if failures:
            raise CkptError('; '.join(failures), phase='release', hint='the daemon tries again when it starts')

    def close(self) -> None:
        try:
            self.restore()
        finally:
            self.let_go()

    def close_after(self, error: BaseException) -> None:
        """Close after a failure. Steps that cannot be undone are added to the error as notes, and left to a
        recovery."""
        try:
            self.close()
        except CkptError as failure:
            error.add_note(failure.message)

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
        """Write the step down, then take it. CannotFreezeError if that fails."""
        try:
            self._journal().add(step)
            self._freeze_request.at(f'freeze-{step.point}')
            step.take(self._freeze_request.context)
        except OSError as error:
            raise CannotFreezeError(f'{step.describe()}: {error.strerror or error}') from error
        self._freeze_request.at(f'freeze-{step.point}-done')

    def living(self) -> tuple[Known, ...]:
        """Return the processes that are alive."""
        alive = self.tree.alive()
        return tuple(Known(task.tgid, task.start_time) for task in self.tree.leaders if task.tgid in alive)

    def _write_end(self) -> None:
        if self._freeze_request.journal is not None:
            self._journal().add(EndProcesses(self.living()))

    def _brakes(self) -> list[tuple[int, AnyStep]]:
        """Return the steps that keep the tree from running, newest first."""
        standing = self._entry.standing() if self._entry else []
        return [(number, step) for number, step in standing if step.stops_tree]


def nothing_to_check() -> None:
    """Check nothing: a `check` for processes without a control socket."""


def refuse_own_tree(tree: Tree) -> None:
    """Refuse a tree that contains this process, which could thaw nothing once it is frozen."""
    if os.getpid() in tree:
        raise InvalidArgument('the tree contains the process that would freeze it', task=os.getpid(), phase='freeze',
                              hint='choose a smaller target')


def timed_out(tasks: list[Task], what: str) -> NoReturn:
    """Raise FreezeTimeout with these tasks, each with its state and the function it sleeps in."""
    rows = [_row(task, what) for task in tasks[:MAX_NAMED]]
    if not rows:
        raise FreezeTimeout('the tree did not come to rest in time', phase='freeze')
    more = f' (and {len(tasks) - 1} more)' if len(tasks) > 1 else ''
    first = rows[0]
    raise FreezeTimeout(f'{first.comm}[{first.pid}] {first.reason}{more}', task=first.pid, resource=first.resource,
                        phase='freeze', refusals=rows)


def unfrozen_tasks(tree: Tree) -> list[Task]:
    """List tasks that keep a cgroup from being frozen. The kernel does not report them, but shows where they sleep."""
    awake = [task for task in tree if task.state not in 'TtZXx' and _place(task) not in RESTING]
    # without wchan a frozen task looks like any sleeping one; a task in D or R is certainly not frozen
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

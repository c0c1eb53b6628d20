# SPDX-License-Identifier: LGPL-2.1-or-later
"""The freezer: bring a tree to rest, and later restore the state that was found.

    with freeze(tree, target, 'auto', deadline, journal, rescan) as frozen:
        seize every thread              adds to frozen.tracees; frozen.tree is the tree to work with
        frozen.let_run()                only the tracer's remote system calls run now
        ...
        frozen.restore()                or frozen.hold(), to leave the tree frozen until the block ends
    at the end of the block, in any case: the found state is restored, then the tracees run

    mode        means
    auto        unit, cgroup or ptrace: the first of them that is possible
    cgroup      cgroup.freeze                                               groups.py
    unit        systemd's FreezeUnit                                        units.py
    ptrace      PTRACE_SEIZE and PTRACE_INTERRUPT of every thread           traced.py
    caller      the caller has frozen it; a task that is not frozen is EBUSY    caller.py

It is synchronous and runs in the tracing thread. Each change is in the journal before it is made, so
ckptd.journal.recover can undo what a killed owner leaves.
"""

from collections.abc import Callable

from ckptd.errors import NotSupported, Refused
from ckptd.freezer.base import (
    CannotFreezeError,
    FreezeRequest,
    FreezeTarget,
    FrozenTree,
    nothing_to_check,
    refuse_own_tree,
)
from ckptd.freezer.caller import check_frozen
from ckptd.freezer.groups import CgroupFrozen
from ckptd.freezer.traced import TracedFrozen
from ckptd.freezer.units import UnitFrozen
from ckptd.journal.entry import FaultPoint, no_fault
from ckptd.journal.steps import StepContext
from ckptd.journal.steps.base import UnitCall
from ckptd.journal.store import Journal
from ckptd.kernel.cgroup import mount_of
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.tree import Tree

__all__ = ['FrozenTree', 'freeze']


def freeze(tree: Tree, target: FreezeTarget, mode: str, deadline: float, journal: Journal, rescan: Callable[[], Tree],
           *,
           job: int = 0, freeze_unit: UnitCall | None = None, thaw_unit: UnitCall | None = None,
           also: int | None = None, check: Callable[[], None] = nothing_to_check, remote_calls: bool = True,
           traced: bool = True, at: FaultPoint = no_fault) -> FrozenTree:
    """Freeze a tree and return it, for `with`. base.FreezeRequest describes the arguments.

    freeze_unit and thaw_unit are None if there is no systemd. traced: stop the tree by ptrace if nothing else is
    possible. FreezeTimeout names the tasks that did not stop; NotFrozen, NotSupported, TreeChanged, PermissionDenied,
    Cancelled. After an error nothing is left changed.
    """
    refuse_own_tree(tree)
    context = StepContext(mount_of(read_mountinfo()), freeze_unit, thaw_unit)
    freeze_request = FreezeRequest(target, deadline, journal, context, rescan, job, also, check, remote_calls, at)
    return _first_that_can(_freezers(tree, mode, freeze_request, traced=traced), tree, freeze_request)


def _freezers(tree: Tree, mode: str, freeze_request: FreezeRequest, *, traced: bool) -> list[type[FrozenTree]]:
    """Return the freezers that this mode allows, the best first."""
    match mode:
        case 'caller':
            return _for_caller(tree, freeze_request)
        case 'unit':
            return [UnitFrozen]
        case 'cgroup':
            return [CgroupFrozen]
        case 'ptrace':
            return [TracedFrozen]
    by_systemd = freeze_request.target.unit and freeze_request.context.freeze_unit
    with_unit: list[type[FrozenTree]] = [UnitFrozen] if by_systemd else []
    return [*with_unit, CgroupFrozen, *([TracedFrozen] if traced else [])]


def _for_caller(tree: Tree, freeze_request: FreezeRequest) -> list[type[FrozenTree]]:
    refusals = check_frozen(tree, freeze_request.context)
    if refusals:
        raise Refused.because(refusals, 'freeze')
    # Frozen by a cgroup, the tree runs no remote system call. It must move to a frozen cgroup that may be thawed.
    stopped = all(task.state in 'TtZX' for task in tree)
    return [FrozenTree] if stopped or not freeze_request.remote_calls else [CgroupFrozen]


def _first_that_can(freezers: list[type[FrozenTree]], tree: Tree, freeze_request: FreezeRequest) -> FrozenTree:
    reasons: list[str] = []
    for freezer in freezers:
        frozen = freezer(tree, freeze_request)
        try:
            frozen.freeze()
        except CannotFreezeError as error:
            frozen.close()
            reasons.append(f'{freezer.mode} freezer: {error}')
        except BaseException as error:
            frozen.close_after(error)
            raise
        else:
            return frozen
    raise NotSupported(f'{freeze_request.target.description} cannot be frozen: {"; ".join(reasons)}', phase='freeze')

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroup freezer: `cgroup.freeze` of the tree's own cgroup, or of a work cgroup that the tree is moved to.

    the tree is all of /a/b, nothing frozen         freeze /a/b
    /a/b contains other processes, too              /a/b/ckptd-JOB-RANDOM    frozen; the tree moves there and back
    ... and /a/b or /a was found frozen             /ckptd-JOB-RANDOM        beside the topmost frozen one

A task that moves from one frozen cgroup to another stays asleep all the way, and a cgroup that was found frozen is not
changed at all. The work cgroup is frozen before the first process moves in. So a process in it cannot fork, and each
round of moving leaves fewer processes outside.
"""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath

from ckptd.errors import TreeChanged
from ckptd.freezer.base import CannotFreezeError, FreezeRequest, FrozenTree, timed_out, unfrozen_tasks
from ckptd.journal.steps import FreezeCgroup, MakeCgroup, Move, Moved, StepContext
from ckptd.kernel.task import read_cgroup2
from ckptd.tree import Tree

ROUNDS = 64                 # of moving processes that were born outside meanwhile


class CgroupFrozen(FrozenTree):
    """A tree frozen through cgroup.freeze."""
    mode = 'cgroup'

    def __init__(self, tree: Tree, freeze_request: FreezeRequest) -> None:
        super().__init__(tree, freeze_request)
        self._cgroup = ''
        self._moves = False

    def freeze(self) -> None:
        context = self._freeze_request.context
        if context.mount is None:
            raise CannotFreezeError('no cgroup v2 hierarchy is mounted')
        try:
            places = read_places(self.tree)
            if not places:
                return          # all tasks are dead
            own = self._own_cgroup(places)
            if own is None:
                self._make_work_cgroup(places)
            else:
                self._take(FreezeCgroup(own))
                self._cgroup = own
        except OSError as error:
            raise CannotFreezeError(f'{error.strerror}: {error.filename}') from error
        self._settle(places)

    @property
    def moved(self) -> bool:
        target = self._freeze_request.target.cgroup
        return self._moves and target is not None and not is_below(self._cgroup, target)

    def hold(self) -> None:
        super().hold()
        if self._cgroup:
            self._wait()

    def _own_cgroup(self, places: dict[int, str]) -> str | None:
        """Return the cgroup that may be frozen as it is: it contains this tree and nothing else, and was not found
        frozen."""
        context = self._freeze_request.context
        own = self._freeze_request.target.cgroup or common(places.values())
        found_frozen = (any(topmost_frozen(context, place) for place in {own, *places.values()})
                        if self._freeze_request.remote_calls else own != '/' and context.cgroup(own).frozen_wanted)
        return own if not found_frozen and self._is_exactly(own, places) else None

    def _is_exactly(self, own: str, places: dict[int, str]) -> bool:
        if own == '/' or not all(is_below(place, own) for place in places.values()):
            return False
        members = set(self._freeze_request.context.cgroup(own).procs(recursive=True))
        if not members <= places.keys():
            # a child born since the scan belongs to the tree
            self.tree = self.rescan()
            places.clear()
            places.update(read_places(self.tree))
        return members <= places.keys()

    def _make_work_cgroup(self, places: dict[int, str]) -> None:
        context = self._freeze_request.context
        threaded = [place for place in sorted(set(places.values())) if context.cgroup(place).type != 'domain']
        if threaded:
            raise CannotFreezeError(f'cgroup {threaded[0]} is threaded, its processes cannot be moved')
        base = common(places.values())
        if self._freeze_request.remote_calls:
            frozen = [top for place in set(places.values()) if (top := topmost_frozen(context, place))]
            base = common([base, *(str(PurePosixPath(top).parent) for top in frozen)])
        self._cgroup = str(PurePosixPath(base) / self._journal().work_name)
        self._take(MakeCgroup(self._cgroup))
        self._take(FreezeCgroup(self._cgroup))
        self._moves = True

    def _settle(self, places: dict[int, str]) -> None:
        """Move in the processes that are outside and wait, until a scan of the frozen tree finds none outside."""
        for _ in range(ROUNDS):
            outside = {tgid: place for tgid, place in places.items() if not is_below(place, self._cgroup)}
            if outside:
                self._bring_in(outside)
            self._wait()
            self._freeze_request.next_round()
            self.tree = self.rescan()
            places = read_places(self.tree)
            if all(is_below(place, self._cgroup) for place in places.values()):
                return
        raise TreeChanged(f'{self._freeze_request.target.description} forks faster than it can be moved',
                          phase='freeze')

    def _bring_in(self, outside: dict[int, str]) -> None:
        if not self._moves:
            raise TreeChanged(f'process {min(outside)} left cgroup {self._cgroup}', task=min(outside), phase='freeze')
        self._take(Move(self._cgroup, tuple(Moved(tgid, self.tree[tgid].start_time, place)
                                            for tgid, place in outside.items() if tgid in self.tree)))

    def _wait(self) -> None:
        freeze_request = self._freeze_request
        cgroup = freeze_request.context.cgroup(self._cgroup)
        try:
            while not cgroup.wait(True, freeze_request.deadline, freeze_request.also):
                freeze_request.check()
                if time.monotonic() >= freeze_request.deadline:
                    timed_out(unfrozen_tasks(self.rescan()), 'does not freeze')
        except OSError as error:
            raise TreeChanged(f'cgroup {self._cgroup}: {error.strerror}', phase='freeze') from error


# ---------------------------------------------------------------- where the processes are

def read_places(tree: Tree) -> dict[int, str]:
    """Read the cgroups of the processes as `read_cgroups` does. CannotFreezeError if one is not visible here."""
    places = read_cgroups(tree)
    for tgid, place in places.items():
        if '/..' in place:
            raise CannotFreezeError(f'process {tgid} is in a cgroup outside of our cgroup namespace')
    return places


def read_cgroups(tree: Tree) -> dict[int, str]:
    """Read the cgroup of each process of the tree that has a living thread, by tgid."""
    places: dict[int, str] = {}
    for task in tree:
        # a leader may be dead while other threads live, and a dead task keeps the name of the cgroup it died in
        if task.is_zombie or task.tgid in places:
            continue
        with suppress(ProcessLookupError):
            places[task.tgid] = read_cgroup2(task.tid)
    return places


def common(names: Iterable[str]) -> str:
    """Return the deepest cgroup that contains all of these."""
    return os.path.commonpath(list(names))


def is_below(name: str, above: str) -> bool:
    """Whether `name` is this cgroup or one below it."""
    return name == above or name.startswith(above.rstrip('/') + '/')


def ways_up(name: str) -> Iterator[str]:
    """Yield the cgroup and all above it, '/' last."""
    path = PurePosixPath(name)
    yield from map(str, (path, *path.parents))


def topmost_frozen(context: StepContext, name: str) -> str:
    """Return the highest cgroup whose cgroup.freeze is 1 among this one and those above it; '' if there is none."""
    frozen = ''
    for above in ways_up(name):
        try:
            frozen = above if context.cgroup(above).frozen_wanted else frozen
        except FileNotFoundError:
            break       # above what the mount shows
    return frozen

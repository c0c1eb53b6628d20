# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit freezer: systemd freezes a unit that is exactly the tree. systemd alone may write attributes of the unit's
cgroup, and its watchdog would kill a unit that was frozen without its knowledge."""

from ckptd.errors import Cancelled, CkptError, FreezeTimeout, InvalidArgument
from ckptd.freezer.base import CannotFreezeError, FreezeRequest
from ckptd.freezer.groups import CgroupFrozen, read_places, topmost_frozen
from ckptd.journal.steps import AnyStep, FreezeUnit, ThawUnit
from ckptd.tree import Tree


class UnitFrozen(CgroupFrozen):
    """A tree frozen through FreezeUnit. A unit that was found frozen is thawed by let_run only, and then frozen
    again."""
    mode = 'unit'

    def __init__(self, tree: Tree, freeze_request: FreezeRequest) -> None:
        super().__init__(tree, freeze_request)
        if freeze_request.target.unit is None or freeze_request.target.cgroup is None:
            raise InvalidArgument(f'{freeze_request.target.description} is not a unit',
                                  hint='freeze=unit needs a unit name')
        self._unit = freeze_request.target.unit
        self._cgroup = freeze_request.target.cgroup
        self._found_frozen = False

    def freeze(self) -> None:
        context = self._freeze_request.context
        if context.freeze_unit is None or context.thaw_unit is None:
            raise CannotFreezeError('there is no systemd')
        try:
            places = read_places(self.tree)
            if not self._is_exactly(self._cgroup, places):
                raise CannotFreezeError(f'unit {self._unit} has processes outside of the tree')
            frozen = {top for place in places.values() if (top := topmost_frozen(context, place))}
        except OSError as error:
            raise CannotFreezeError(f'{error.strerror}: {error.filename}') from error
        if frozen - {self._cgroup}:
            raise CannotFreezeError(f'cgroup {min(frozen - {self._cgroup})} is frozen, so the unit cannot be thawed')
        self._found_frozen = bool(frozen)
        if not self._found_frozen:
            self._ask_systemd()
        self._settle(places)

    def _ask_systemd(self) -> None:
        try:
            self._take(FreezeUnit(self._unit))
        except (Cancelled, FreezeTimeout):
            raise
        except CkptError as error:
            raise CannotFreezeError(f'systemd cannot freeze {self._unit}: {error.message}') from error

    def let_run(self) -> None:
        if self._found_frozen:
            try:
                self._take(ThawUnit(self._unit))
            except CannotFreezeError as error:
                raise CkptError(str(error), phase='freeze') from error
        else:
            super().let_run()

    def condemn(self, *, again: bool = True) -> None:
        if not self._found_frozen:
            super().condemn(again=again)
            return
        self._write_end()       # the unit is returned frozen, and the entry ends
        if not again:           # or not: its manager stops it
            self._journal().undone(*(number for number, _ in self._thaws()))

    def hold(self) -> None:
        if not self._found_frozen:
            super().hold()
            return
        # a later let_run thaws it by a step of its own
        for number, step in self._thaws():
            try:
                step.undo(self._freeze_request.context, {})
            except OSError as error:
                raise CkptError(f'cannot undo {step.describe()}: {error.strerror}', errno=error.errno) from error
            self._journal().undone(number)
        self._wait()

    def _thaws(self) -> list[tuple[int, AnyStep]]:
        """Return the steps that have thawed a unit which was found frozen."""
        standing = self._entry.standing() if self._entry else []
        return [(number, step) for number, step in standing if isinstance(step, ThawUnit)]

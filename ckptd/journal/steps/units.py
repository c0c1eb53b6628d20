# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps that systemd takes: FreezeUnit and ThawUnit of org.freedesktop.systemd1.Manager."""

import errno
from collections.abc import Mapping

from ckptd.journal.steps.base import Moved, Step, StepContext, UnitCall, UnitName


class FreezeUnit(Step, frozen=True):
    """Call FreezeUnit for a unit that was found running."""
    point = 'freeze-unit'
    stops_tree = True
    unit: UnitName

    def describe(self) -> str:
        return f'freezing unit {self.unit}'

    def take(self, context: StepContext) -> None:
        _call(context.freeze_unit, self.unit)

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        _call(context.thaw_unit, self.unit)


class ThawUnit(Step, frozen=True):
    """Call ThawUnit for a unit that was found frozen. It is undone by freezing the unit again."""
    point = 'thaw-unit'
    unit: UnitName

    def describe(self) -> str:
        return f'thawing unit {self.unit}'

    def take(self, context: StepContext) -> None:
        _call(context.thaw_unit, self.unit)

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        _call(context.freeze_unit, self.unit)


def _call(call: UnitCall | None, unit: str) -> None:
    if call is None:
        raise OSError(errno.EOPNOTSUPP, f'no systemd for unit {unit}')
    call(unit)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The step that drops the packets of connections which a restart goes on with."""

from collections.abc import Mapping
from typing import Annotated

import msgspec

from ckptd.journal.steps.base import Moved, Step, StepContext
from ckptd.kernel.nftables import remove_table


class DropPackets(Step, frozen=True):
    """A table of nftables (kernel/nftables.py). Undo: remove it."""
    point = 'drop-packets'
    table: Annotated[str, msgspec.Meta(pattern=r'\Ackptd-[0-9a-f]{16}\Z')]

    def describe(self) -> str:
        return 'holding TCP connections'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        remove_table(self.table)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The time for which a unit with a watchdog may be stopped by a process that cannot feed it."""

from collections.abc import Callable

import pytest

from ckptd.errors import FreezeTimeout
from ckptd.kernel.creds import CAP_SYS_ADMIN, capget, give_up_capability
from ckptd.operation.watchdog import StopLimit
from ckptd.protocol.requests import Caller, HoldRequest, UnitFacts
from ckptd.target import UnitTarget


def limit_of(usec: int, *, brokered: bool = False) -> StopLimit:
    return StopLimit(HoldRequest(caller=Caller(1000, 1000), spool='/spool', runtime='/run', brokered=brokered,
                                 target=UnitTarget('a.service'), unit=UnitFacts(7, usec)))


def test_half_of_its_time(forked: Callable[..., int]) -> None:
    def check() -> None:
        if capget().effective:
            give_up_capability(CAP_SYS_ADMIN)
        with pytest.raises(FreezeTimeout, match='half of the time of its watchdog'):
            limit_of(1).check()
        limit_of(3_600_000_000).check()
        limit_of(0).check()
        limit_of(1, brokered=True).check()      # the broker feeds it

    forked(check)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What counts as an answer of polkit's, and what as none. tests/polkit has the real one."""

import pytest

from ckptd.bus.connection import Connection
from ckptd.bus.polkit import Answer, Polkit
from tests.bus.conftest import Service


async def test_a_bus_without_polkit(service: Service) -> None:
    async with await Connection.open(service.address) as connection:
        assert await Polkit(connection).ask(':1.1', 'org.ckptd1.freeze-own', {}) == Answer.ABSENT


async def test_polkit_that_leaves_while_it_is_asked_is_no_polkit_that_is_not_there(
        service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it restarts, nobody has what only its absence allows."""
    async with await Connection.open(service.address) as connection:
        async with await Connection.open(service.address) as gone:
            name = gone.unique_name
        polkit = Polkit(connection)

        async def found(self: Polkit) -> bool:
            self._trusted = name
            return True

        monkeypatch.setattr(Polkit, '_is_there', found)
        assert await polkit.ask(':1.1', 'org.ckptd1.freeze-own', {}) == Answer.NO

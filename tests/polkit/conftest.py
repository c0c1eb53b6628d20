# SPDX-License-Identifier: LGPL-2.1-or-later
"""A polkitd on a bus with the policy of the system's, of both kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.polkit import Polkit
from tests.lib.systembus import BUSES


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.needs(
    'root', 'polkit', 'unshare', 'busctl', 'dbus' if kind == 'dbus-daemon' else kind)) for kind in BUSES])
def polkit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Polkit]:
    with BUSES[request.param](tmp_path) as bus, Polkit(bus) as running:
        yield running

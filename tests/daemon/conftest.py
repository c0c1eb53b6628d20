# SPDX-License-Identifier: LGPL-2.1-or-later
"""Daemons as programs, and what the tests of them share."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bus.broker import Broker
from tests.lib.bus import ROOT, PrivateBus, read_line, terminate

COMMAND = [sys.executable, '-m', 'ckptd.daemon']


def places(tmp_path: Path) -> list[str]:
    return ['--spool', str(tmp_path / 'spool'), '--runtime', str(tmp_path / 'run')]


@pytest.fixture(params=[pytest.param('dbus-daemon', marks=pytest.mark.needs('dbus')),
                        pytest.param('dbus-broker', marks=pytest.mark.needs('dbus-broker'))])
def any_bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a bus of either kind, where everybody may do everything."""
    with (PrivateBus(tmp_path) if request.param == 'dbus-daemon' else Broker()) as bus:
        yield bus.address


@pytest.fixture
def on_bus(private_bus: PrivateBus, tmp_path: Path) -> Iterator['subprocess.Popen[bytes]']:
    """A daemon on somebody else's bus, ready; its log is on stderr."""
    with subprocess.Popen([*COMMAND, '--address', private_bus.address, *places(tmp_path), '--verbose'],
                          stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            while 'ready' not in (line := read_line(process.stderr.fileno(), 20)):
                assert line
            yield process
        finally:
            terminate(process)

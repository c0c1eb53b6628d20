# SPDX-License-Identifier: LGPL-2.1-or-later
"""A polkitd on a bus with the policy of the system's, of both kinds."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.polkit import Polkit
from tests.lib.systembus import BUSES, USERS


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.needs(
    'root', 'polkit', 'unshare', 'busctl', 'dbus' if kind == 'dbus-daemon' else kind)) for kind in BUSES])
def polkit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Polkit]:
    with BUSES[request.param](tmp_path) as bus, Polkit(bus) as running:
        yield running


def _helper(setup: str) -> Iterator[int]:
    """A process that root starts, that does this with itself, and then waits."""
    script = f'import ctypes, os, sys\n{setup}\nprint(flush=True)\nsys.stdin.read()'
    with subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b'\n'
        yield process.pid
        process.stdin.close()


@pytest.fixture
def privileged() -> Iterator[int]:
    """alice's, but that it may take root's uid again, as a program with set-user-ID may."""
    yield from _helper(f'os.setresuid({USERS["alice"]}, {USERS["alice"]}, 0)')


@pytest.fixture
def undumpable() -> Iterator[int]:
    """All alice's, with PR_SET_DUMPABLE 0."""
    alice = USERS['alice']
    yield from _helper(f'os.setgroups([]); os.setresgid({alice}, {alice}, {alice}); '
                       f'os.setresuid({alice}, {alice}, {alice}); ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)')

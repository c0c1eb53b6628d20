# SPDX-License-Identifier: LGPL-2.1-or-later
"""One user floods ckptd with calls; another one's are answered. Compared with the same call without a flood and with
what the bus itself takes meanwhile, both measured in the same run."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from ckptd.kernel.status import read_status
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT, PrivateBus, Served, read_line
from tests.lib.systembus import BUSES, USERS

pytestmark = [pytest.mark.needs('root', 'unshare', 'polkit'), pytest.mark.timeout(300)]

IMAGES = 20
TIMES_LONGER = 30       # without turns it is some 500


@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.needs('dbus' if kind == 'dbus-daemon' else kind))
                        for kind in BUSES])
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PrivateBus]:
    with BUSES[request.param](tmp_path) as running:
        yield running


@contextmanager
def client(part: str, address: str, user: str) -> Iterator['subprocess.Popen[bytes]']:
    with subprocess.Popen([sys.executable, '-m', 'tests.daemon.flooder', part, address, str(USERS[user])],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        try:
            yield process
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


def measured(process: 'subprocess.Popen[bytes]') -> tuple[float, float]:
    """Seconds that ListImages took, and a method of the bus."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b'\n')
    process.stdin.flush()
    ours, theirs = json.loads(read_line(process.stdout.fileno(), 250))
    return median(ours), median(theirs)


def test_sixty_connections_that_flood(bus: PrivateBus, tmp_path: Path, spool: Path) -> None:
    for _ in range(IMAGES):
        write_image(spool, USERS['bob'])
    with Served(bus.address, tmp_path, spool) as daemon, client('measure', bus.address, 'bob') as bob:
        quiet, _ = measured(bob)
        with client('flood', bus.address, 'alice') as alice:
            assert alice.stdout is not None
            assert read_line(alice.stdout.fileno(), 60) == 'flooding\n'
            loaded, of_the_bus = measured(bob)
        assert loaded < TIMES_LONGER * (quiet + of_the_bus), (quiet, loaded, of_the_bus)
        assert measured(bob)[0] < TIMES_LONGER * quiet
        assert read_status(daemon.pid).vm_rss < 256 << 20
        assert 'Traceback' not in daemon.log

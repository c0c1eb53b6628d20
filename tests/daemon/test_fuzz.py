# SPDX-License-Identifier: LGPL-2.1-or-later
"""Random messages at every method of a daemon, for CKPTD_FUZZ_SECONDS (10), and nothing of them may stay.

Again with the seed of a failure: CKPTD_FUZZ_SEED=... pytest tests/daemon/test_fuzz.py
"""

import asyncio
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.kernel.status import read_status
from tests.daemon.aftermath import check, idle, tidied
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT as CHECKOUT
from tests.lib.bus import Served

SECONDS = float(os.environ.get('CKPTD_FUZZ_SECONDS') or 10)
NOBODY = 65534

pytestmark = [pytest.mark.needs('root', 'cgroup2', 'ptrace'), pytest.mark.timeout(120 + SECONDS)]


@pytest.fixture
def served(any_bus: str, tmp_path: Path, spool: Path) -> Iterator[Served]:
    for owner in (*[NOBODY] * 20, 1000):
        write_image(spool, owner)
    with Served(any_bus, tmp_path, spool, env={'PYTHONWARNINGS': 'default'}) as daemon:
        yield daemon


@pytest.fixture
def victim() -> Iterator[int]:
    """It is not waited for before the end: even dead it keeps its number."""
    with subprocess.Popen(['sleep', '1000'], user=NOBODY, group=NOBODY, extra_groups=[], cwd='/',
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield process.pid
        process.kill()


def fuzz(served: Served, seed: str, victim: int) -> dict[str, Any]:
    arguments = [served.address, seed, f'{SECONDS}s', str(NOBODY), str(victim)]
    done = subprocess.run([sys.executable, '-m', 'tests.daemon.fuzzer', *arguments], cwd=CHECKOUT, capture_output=True,
                          text=True, timeout=SECONDS + 90, check=False)
    assert done.returncode == 0, f'the fuzzer itself failed, CKPTD_FUZZ_SEED={seed}:\n{done.stderr}'
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_random_messages(served: Served, victim: int) -> None:
    seed = os.environ.get('CKPTD_FUZZ_SEED') or secrets.token_hex(4)
    again = f'CKPTD_FUZZ_SEED={seed}'
    asyncio.run(tidied(served, victim))
    before = idle(served.pid)
    tally = fuzz(served, seed, victim)
    print(again, *(f'{what}: {tally[what]}' for what in ('sent', 'called', 'served', 'answers', 'vague')), sep='\n')
    assert tally['wrong'] == [], again
    asyncio.run(tidied(served, victim))
    check(served, before, again)
    status = read_status(victim)
    assert status.tracer_pid == 0
    assert served.stop() == 0, again

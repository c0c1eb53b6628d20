# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lines of the log about a user who asks for very much."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.bus import ROOT, PrivateBus, Served
from tests.programs.conftest import await_that

pytestmark = pytest.mark.needs('root', 'dbus')

NOBODY = 65534
CALLS = 400
# many calls that anybody may make, then two that are refused; what they answer is the last line
PROGRAM = """
import asyncio, os, sys
from ckptd.client.connection import connect
from ckptd.errors import CkptError
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
async def main():
    async with connect(sys.argv[1]) as ckptd:
        for _ in range(int(sys.argv[3]) // 20):
            await asyncio.gather(*(ckptd.list_jobs() for _ in range(20)))
        for call in (ckptd.freeze('pid:1'), ckptd.image('20260101_000000_x_0000')):
            try:
                await call
            except CkptError as error:
                print(error.name, end=' ')
asyncio.run(main())
"""


@pytest.fixture
def served(private_bus: PrivateBus, tmp_path: Path) -> Iterator[Served]:
    with Served(private_bus.address, tmp_path, tmp_path / 'spool') as running:
        yield running


def test_who_asks_for_much_is_seen_to_be_refused(served: Served) -> None:
    done = subprocess.run([sys.executable, '-c', PROGRAM, served.address, str(NOBODY), str(CALLS)], cwd=ROOT,
                          env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'}, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.stdout.split() == ['PermissionDenied', 'PermissionDenied'], done.stderr
    for method in ('Freeze', 'GetImage'):
        assert f'refused method={method} uid={NOBODY}' in served.log, served.log

    def counted() -> bool:
        """Those without a line of their own are in that of their second, which comes though nobody asks any more."""
        left_out = re.findall(rf'more allowed uid={NOBODY} method=ListJobs decisions=(\d+)', served.log)
        lines = served.log.count(f'ckptd.audit: allowed method=ListJobs uid={NOBODY}')
        return lines + sum(map(int, left_out)) == CALLS

    await_that('every call is counted', counted)

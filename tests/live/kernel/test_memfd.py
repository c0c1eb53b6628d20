# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memfds under each setting of vm.memfd_noexec, which belongs to a pid namespace."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.kernel.memfd import F_SEAL_EXEC, make_memfd
from tests.lib.bus import ROOT

SETTING = Path('/proc/sys/vm/memfd_noexec')
pytestmark = [pytest.mark.needs('root', 'unshare'),
              pytest.mark.skipif(not SETTING.exists(), reason='vm.memfd_noexec is of Linux 6.3')]

ASK = """
import fcntl, os, sys
from pathlib import Path
from ckptd.kernel.memfd import is_forbidden, make_memfd
setting, mode, seals = sys.argv[1], int(sys.argv[2], 8), int(sys.argv[3], 0)
Path('/proc/sys/vm/memfd_noexec').write_text(setting)
if is_forbidden(mode, seals):
    try:
        make_memfd('memfd', mode, seals)
    except PermissionError:
        print('forbidden')
    raise SystemExit
fd = make_memfd('memfd', mode, seals)
os.fchmod(fd, mode)
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
print(oct(os.fstat(fd).st_mode & 0o7777), hex(fcntl.fcntl(fd, fcntl.F_GET_SEALS)))
"""


@pytest.mark.parametrize(('setting', 'mode', 'seals', 'expected'), [
    *[(setting, 0o666, F_SEAL_EXEC, '0o666 0x20') for setting in '012'],
    *[(setting, 0o755, 0, '0o755 0x0') for setting in '01'],
    *[(setting, 0o600, 0, '0o600 0x0') for setting in '01'],
    *[(setting, 0o755, F_SEAL_EXEC, '0o755 0x3e') for setting in '01'],
    ('2', 0o755, 0, 'forbidden'), ('2', 0o600, 0, 'forbidden')])
def test_mode_and_seals_are_those_that_are_wanted(setting: str, mode: int, seals: int, expected: str) -> None:
    found = subprocess.run(
        ['unshare', '--pid', '--fork', '--mount-proc', sys.executable, '-c', ASK, setting, f'{mode:o}', str(seals)],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (found.stdout.strip(), found.stderr) == (expected, '')


def test_what_may_be_executed_is_made_so_here() -> None:
    fd = make_memfd('memfd', 0o755, 0)
    try:
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o777
    finally:
        os.close(fd)

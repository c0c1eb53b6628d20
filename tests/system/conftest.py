# SPDX-License-Identifier: LGPL-2.1-or-later
"""One installation and one booted machine for all tests of this directory."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lib.gate import verdict
from tests.system.container import ROOT, Container

COUNTER = """[Unit]
Description=A service to checkpoint
[Service]
ExecStart=/bin/sh -c 'n=0; while :; do n=$((n+1)); echo $n > /run/counter; read -t 0.05 _ < /run/never; done'
ExecStartPre=/bin/sh -c 'test -p /run/never || mkfifo /run/never'
"""


@pytest.fixture(scope='session')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install DESTDIR=` makes, for PREFIX=/usr as a distribution would."""
    stage = tmp_path_factory.mktemp('stage')
    done = subprocess.run(['make', '--no-print-directory', 'install', f'DESTDIR={stage}', 'PREFIX=/usr'],
                          cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return stage


@pytest.fixture(scope='session')
def machine(test_cgroup: Path | None, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    reason, failure = verdict(['systemd', 'unshare', 'busctl'])
    if reason:
        (pytest.fail if failure else pytest.skip)(reason)
    assert test_cgroup is not None
    # beside the cgroup of the tests: what systemd makes and removes there is no test's leaving
    with Container(test_cgroup.parent, tmp_path_factory.mktemp('machine'), stage=installed) as booted:
        yield booted

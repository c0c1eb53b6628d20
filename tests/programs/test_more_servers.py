# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers and pools that take more packages, as those of test_servers.py: `make programs`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs.conftest import ROOT, Standalone
from tests.programs.test_programs import Program
from tests.programs.test_servers import live_on, network

__all__ = ['network']       # a fixture

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'root', 'ip'), pytest.mark.timeout(400), pytest.mark.heavy]
# with the packages of requirements-programs.lock
PYTHON = ROOT / '.cache/programs/bin/python'
PROGRAMS = {'apache': ('web.Apache',), 'go': ('web.Go',), 'java': ('shells.Jshell',)}
OF_PYTHON = ('pools.Dask', 'pools.Joblib', 'pools.Jupyter', 'pools.Loky', 'web.Gunicorn', 'web.Uvicorn')


@pytest.mark.usefixtures('network')
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.needs(need)) for need, names in PROGRAMS.items() for name in names])
def test_server_with_its_client(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    live_on(program, standalone, tmp_path, name, sys.executable)


@pytest.mark.needs('programs-of-python')
@pytest.mark.usefixtures('network')
@pytest.mark.parametrize('name', OF_PYTHON)
def test_program_of_python(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    live_on(program, standalone, tmp_path, name, PYTHON)


@pytest.fixture
def run_sshd() -> Iterator[None]:
    """The directory into which sshd(8) locks its processes without rights. A unit of systemd makes it else."""
    path = Path('/run/sshd')
    made = not path.exists()
    path.mkdir(mode=0o755, exist_ok=True)
    yield
    if made:
        path.rmdir()


@pytest.mark.needs('ssh', 'sshd', 'postgres')
@pytest.mark.usefixtures('network', 'run_sshd')
@pytest.mark.parametrize('name', ['shells.Sshd', 'shells.SshdOfAUser'])
def test_sshd_with_sessions(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    live_on(program, standalone, tmp_path, name, sys.executable)

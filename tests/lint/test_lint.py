# SPDX-License-Identifier: LGPL-2.1-or-later
"""Linters are tests: what `make lint` runs, and the shell scripts."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.lint


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    run(sys.executable, '-m', 'ruff', 'check', '.')


@pytest.mark.timeout(300)
def test_mypy() -> None:
    run(sys.executable, '-m', 'mypy')


@pytest.mark.parametrize('script', ['.ci/run'])
def test_shell_scripts_parse(script: str) -> None:
    run('sh', '-n', script)


def test_make_help_lists_every_public_target() -> None:
    shown = subprocess.run(['make', 'help'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    listed = {line.split()[0] for line in shown.splitlines()}
    assert {'demo', 'test', 'check', 'lint', 'unit', 'unit-all', 'bench', 'fuzz', 'random', 'programs', 'install',
            'uninstall', 'dist'} <= listed


@pytest.mark.parametrize('lock', sorted(ROOT.glob('requirements*.lock')), ids=lambda path: path.name)
def test_lock_files_name_no_host(lock: Path) -> None:
    """Whoever builds chooses the index; a lock pins versions and hashes only."""
    text = lock.read_text()
    assert '://' not in text
    pins = [line for line in text.splitlines() if '==' in line]
    assert pins
    assert all(line.endswith('\\') for line in pins), 'a pin without a hash'

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of images share."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / 'tmpfs'
    path.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=256k,mode=700', 'tmpfs', path], check=True)
    yield path
    subprocess.run(['umount', path], check=True)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories of a test that other users are to reach."""

import tempfile
from pathlib import Path


def let_others_through(path: Path) -> None:
    """Whoever knows the name may go there: pytest keeps its directories, more of them under pytest-xdist, to itself."""
    top = Path(tempfile.gettempdir())
    for directory in (path, *path.parents):
        if directory == top or not directory.is_relative_to(top):
            return
        directory.chmod(directory.stat().st_mode & 0o7777 | 0o011)

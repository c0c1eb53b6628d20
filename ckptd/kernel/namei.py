# SPDX-License-Identifier: LGPL-2.1-or-later
"""Paths that /proc shows of another task, and what they lead to."""

import os
from pathlib import Path


def lstat_of_task(tid: int, path: str) -> os.stat_result | None:
    """What an absolute path from a link or map of task `tid` names there; None if nothing, or nothing we may see.

    d_path() in fs/d_path.c goes up to the reader's root or, in another mount namespace, to the root of that one; so a
    chroot of the task is in the path when we share its mount namespace, and its root leads there when we do not.
    """
    prefix = '' if _mount_namespace('self') == _mount_namespace(str(tid)) else f'/proc/{tid}/root'
    try:
        return Path(prefix + path).lstat()
    except (OSError, ValueError):
        return None


def _mount_namespace(task: str) -> str:
    try:
        return os.readlink(f'/proc/{task}/ns/mnt')  # noqa: PTH115
    except OSError:
        return ''

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree as records: its size and the ids of its tasks."""

import os
import time

from ckptd.image import records
from ckptd.image.records import CHUNK
from ckptd.tree import Tree


def header(tree: Tree, processes: int) -> records.Header:
    return records.Header(
        tree.root.vtid, len(tree), processes, time.time_ns(), os.sysconf('SC_PAGE_SIZE'), os.uname().machine)


def task_ids(tree: Tree) -> list[records.TaskIds]:
    """Return the ids of all tasks, 256 per record."""
    chunks = [tree.tasks[first:first + CHUNK] for first in range(0, len(tree), CHUNK)]
    return [records.TaskIds(*(tuple(getattr(task, name) for task in chunk)
                              for name in ('vtid', 'vtgid', 'vppid', 'vpgid', 'vsid'))) for chunk in chunks]

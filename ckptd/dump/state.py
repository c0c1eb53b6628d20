# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tree as records: its size, namespaces, and the ids of its tasks."""

import os
import time

from ckptd.image import records
from ckptd.image.records import CHUNK
from ckptd.kernel.task import read_namespaces
from ckptd.tree import Task, Tree


def header(tree: Tree, processes: int) -> records.Header:
    return records.Header(
        tree.root.vtid, len(tree), processes, time.time_ns(), os.sysconf('SC_PAGE_SIZE'), os.uname().machine)


def _of_the_machine() -> list[tuple[str, int]]:
    """Return the namespaces of the first process, because a service that dumps has a mount namespace of its own."""
    try:
        return list(read_namespaces(1).items())
    except (PermissionError, ProcessLookupError):
        return []


def namespaces(root: Task) -> records.Namespaces:
    own = {*read_namespaces(os.getpid()).items(), *_of_the_machine()}
    return records.Namespaces(tuple(records.Namespace(name, inode, int((name, inode) in own))
                                    for name, inode in sorted(read_namespaces(root.tid).items())))


def task_ids(tree: Tree) -> list[records.TaskIds]:
    """Return the ids of all tasks, 256 per record."""
    chunks = [tree.tasks[first:first + CHUNK] for first in range(0, len(tree), CHUNK)]
    return [records.TaskIds(*(tuple(getattr(task, name) for task in chunk)
                              for name in ('vtid', 'vtgid', 'vppid', 'vpgid', 'vsid'))) for chunk in chunks]

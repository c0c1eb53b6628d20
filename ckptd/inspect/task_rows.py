# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rows that describe a tree for people and programs. Live trees and images have the same keys."""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

from ckptd.image.reader import ImageReader
from ckptd.image.records import PAGE, Credentials, FdTable, SavedFile
from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_link
from ckptd.tree import Task, Tree

Row = dict[str, Any]

# bytes of links of one process, and of all: a path may have 4 KiB, and a process a million open files
MAX_LINKS = 32 << 10
MAX_ALL_LINKS = 8 << 20


def live_rows(tree: Tree, denied: Collection[int] = ()) -> list[Row]:
    """Return one row per task: ids, comm, state, depth, uid; for a process also rss (bytes) and fds ('FD LINK') as far
    as there is room, and the number of fds left out.

    denied: tasks for which only public facts are listed. 0 stands for all tasks.
    """
    return list(_with_links(_live_row(task, show=task.is_leader and 0 not in denied and task.tid not in denied)
                            for task in tree))


def _with_links(made: Iterable[tuple[Row, Iterable[str | None]]]) -> Iterator[Row]:
    """Yield the rows, each with as many links as there is room for. None: the fd was closed meanwhile."""
    left = MAX_ALL_LINKS
    for row, links in made:
        taken: list[str] = []
        rest, room = iter(links), min(left, MAX_LINKS)
        for link in rest:
            size = len(os.fsencode(link or ''))
            if size > room:
                row['fds_left_out'] = 1 + sum(1 for other in rest if other)
                break
            room, left = room - size, left - size
            taken += [link] if link else []
        row['fds'] = taken
        yield row


def _live_row(task: Task, *, show: bool) -> tuple[Row, Iterable[str | None]]:
    rss, uid = 0, 0
    fds: Iterable[str | None] = ()
    try:
        status = read_status(task.tgid, task.tid)
        rss, uid = (status.vm_rss if show else 0), status.uids[0]
        fds = _links(task) if show else ()
    except ProcessLookupError:
        pass            # it died since the scan; what was read is kept
    return {'tid': task.tid, 'tgid': task.tgid, 'ppid': task.ppid, 'pgid': task.pgid, 'sid': task.sid,
            'vtid': task.vtid, 'parent_tid': task.parent_tid, 'comm': task.comm, 'state': task.state,
            'depth': task.depth, 'rss': rss, 'uid': uid}, fds


def _links(task: Task) -> Iterator[str | None]:
    with suppress(PermissionError, ProcessLookupError):
        for fd in list_fds(task.tid):
            try:
                yield f'{fd} {read_link(task.tid, f"fd/{fd}")}'
            except FileNotFoundError:
                yield None      # closed since it was listed


def image_rows(reader: ImageReader) -> list[Row]:
    """Return the rows of an image. Every id in them is a vpid."""
    return list(_with_links(_image_rows(reader)))


def _image_rows(reader: ImageReader) -> Iterator[tuple[Row, Iterable[str | None]]]:
    depths: dict[int, int] = {}
    for task in reader.tasks:
        record = task.record
        depth = depths[task.vpid] = (depths.get(record.parent, -1) + 1 if task.is_leader else depths.get(task.vtgid, 0))
        credentials = reader.table(Credentials).get(task.vpid)
        yield {
            'tid': task.vpid, 'tgid': task.vtgid, 'ppid': task.vppid, 'pgid': task.vpgid, 'sid': task.vsid,
            'vtid': task.vpid, 'parent_tid': record.parent, 'comm': record.comm, 'state': chr(record.state),
            'depth': depth, 'rss': _image_rss(reader, record.mm_id) if task.is_leader else 0,
            'uid': credentials.uids[0] if credentials else 0}, _image_links(reader, record.files_id * task.is_leader)


def _image_rss(reader: ImageReader, mm_id: int) -> int:
    return sum(run.pages for run in reader.memory(mm_id).runs) * PAGE if mm_id else 0


def _image_links(reader: ImageReader, files_id: int) -> Iterator[str]:
    for fd in reader.get(FdTable, files_id).fds if files_id else ():
        yield f'{fd.fd} {reader.get(SavedFile, fd.file_id).link}'

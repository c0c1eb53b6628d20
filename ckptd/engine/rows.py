# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tree as rows for people and programs: live, or from an image; the same keys in both."""

from collections.abc import Collection
from typing import Any

from ckptd.image.reader import ImageReader
from ckptd.image.records import PAGE, Credentials, FdTable, OpenFile
from ckptd.kernel.fdinfo import list_fds
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_link
from ckptd.tree import Task, Tree

Row = dict[str, Any]


def live_rows(tree: Tree, denied: Collection[int] = ()) -> list[Row]:
    """A row a task: ids, comm, state, depth, uid; of a process also rss (bytes) and fds ('FD LINK').

    denied: tasks of which only that is told which everybody may know. 0 stands for all.
    """
    return [_live_row(task, show=task.is_leader and 0 not in denied and task.tid not in denied) for task in tree]


def _live_row(task: Task, *, show: bool) -> Row:
    rss, uid, fds = 0, 0, []
    try:
        status = read_status(task.tgid, task.tid)
        rss, uid = (status.vm_rss if show else 0), status.uids[0]
        fds = _links(task) if show else []
    except ProcessLookupError:
        pass            # it died since the scan: what was read stays
    return {'tid': task.tid, 'tgid': task.tgid, 'ppid': task.ppid, 'pgid': task.pgid, 'sid': task.sid,
            'vtid': task.vtid, 'parent_tid': task.parent_tid, 'comm': task.comm, 'state': task.state,
            'depth': task.depth, 'rss': rss, 'uid': uid, 'fds': fds}


def _links(task: Task) -> list[str]:
    links = []
    try:
        for fd in list_fds(task.tid):
            try:
                links.append(f'{fd} {read_link(task.tid, f"fd/{fd}")}')
            except FileNotFoundError:
                continue        # closed since it was listed
    except PermissionError:
        return []
    return links


def image_rows(reader: ImageReader) -> list[Row]:
    """The same of an image, where every id is a vpid."""
    depths: dict[int, int] = {}
    rows = []
    for task in reader.tasks:
        record = task.record
        depth = depths[task.vpid] = (depths.get(record.parent, -1) + 1 if task.is_leader else depths.get(task.vtgid, 0))
        credentials = reader.table(Credentials).get(task.vpid)
        rows.append({
            'tid': task.vpid, 'tgid': task.vtgid, 'ppid': task.vppid, 'pgid': task.vpgid, 'sid': task.vsid,
            'vtid': task.vpid, 'parent_tid': record.parent, 'comm': record.comm, 'state': chr(record.state),
            'depth': depth, 'rss': _image_rss(reader, record.mm_id) if task.is_leader else 0,
            'uid': credentials.uids[0] if credentials else 0,
            'fds': _image_links(reader, record.files_id) if task.is_leader else []})
    return rows


def _image_rss(reader: ImageReader, mm_id: int) -> int:
    return sum(run.pages for run in reader.memory(mm_id).runs) * PAGE if mm_id else 0


def _image_links(reader: ImageReader, files_id: int) -> list[str]:
    if not files_id:
        return []
    return [f'{fd.fd} {reader.get(OpenFile, fd.file_id).link}' for fd in reader.get(FdTable, files_id).fds]

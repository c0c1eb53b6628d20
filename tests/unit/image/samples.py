# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images made by hand: hypothesis strategies for every record, and a small image that is sound."""

import dataclasses
import struct
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from ckptd.image import records as r
from ckptd.image.grammar import Record, Struct
from ckptd.image.manifest import Manifest
from ckptd.image.writer import ImageWriter, Incoming

IMAGE = '20240131_235959_sample_00ff'
PAGE = r.PAGE
TEXT = st.binary(max_size=12).map(lambda data: data.decode('utf-8', 'surrogateescape'))


def values(cls: type[Struct]) -> st.SearchStrategy[Any]:
    """Any value of a record or layout class, from its annotations."""
    hints = get_type_hints(cls, include_extras=True)
    return st.builds(cls, *[_field(hints[field.name]) for field in dataclasses.fields(cls)])  # type: ignore[arg-type]


def _field(annotation: Any) -> st.SearchStrategy[Any]:
    args = get_args(annotation)
    if args and isinstance(args[1], str):       # Annotated[int, 'H']
        return st.integers(0, (1 << 8 * struct.calcsize('<' + args[1])) - 1)
    if get_origin(annotation) is tuple:
        return st.lists(_field(args[0]), max_size=4).map(tuple)
    if annotation is str:
        return TEXT
    return st.binary(max_size=40) if annotation is bytes else values(annotation)


def manifest(**changes: Any) -> Manifest:
    """Of an image with one task, vpid 7."""
    fields: dict[str, Any] = {
        'image': IMAGE, 'created_usec': 1_700_000_000_000_000, 'ckptd_version': '0.1.0', 'kernel': '6.18.0',
        'boot_id': '00000000-0000-0000-0000-000000000000', 'owner_uid': 0, 'owner_gid': 0, 'target': 'pid:7',
        'root': 7, 'command': 'sample', 'tasks': 1, 'processes': 1, 'freeze_mode': 'cgroup'}
    return Manifest(**{**fields, **changes})


def task(vpid: int = 7, **changes: Any) -> r.TaskRecord:
    fields: dict[str, Any] = {
        'vpid': vpid, 'parent': 0, 'comm': 'sample', 'state': ord('S'), 'exit_code': 0, 'exit_signal': 17,
        'stop_signal': 0, 'pf_flags': 0, 'mm_id': 1, 'files_id': 1, 'fs_id': 1, 'sighand_id': 1, 'cgroup': '/'}
    return r.TaskRecord(**{**fields, **changes})


def vma(start: int, pages: int, **changes: Any) -> r.Vma:
    fields: dict[str, Any] = {
        'mm_id': 1, 'start': start, 'end': start + pages * PAGE, 'protection': 3, 'flags': 0x22, 'kind': r.ANON,
        'offset': 0, 'object': 0, 'locked': 0, 'vm_flags': 'rd wr mr mw me ac', 'name': ''}
    return r.Vma(**{**fields, **changes})


def tree_records(*tasks: r.TaskRecord) -> dict[str, list[Record]]:
    """What one process of these threads has, by part; memory is left to the caller."""
    vpids = tuple(one.vpid for one in tasks)
    leader = vpids[0]
    ids = r.TaskIds(vpids, (leader,) * len(tasks), (1,) * len(tasks), (leader,) * len(tasks), (leader,) * len(tasks))
    gpr = bytes(range(216))
    return {
        'TREE': [r.Header(leader, len(tasks), 1, 1, PAGE, 'x86_64'), ids, *tasks],
        'TASK': [record for vpid in vpids for record in (
            r.Credentials(vpid, (0,) * 4, (0,) * 4, (), (0,) * 5, 0, 0, 0),
            r.Registers(vpid, 62, gpr, bytes(576)),
            r.ThreadSignals(vpid, 0, 0, 2, 0, ()))] + [
                r.SignalActions(1, (r.SigAction(0, 0, 0, 0),) * 64), r.Fs(1, '/', '/', 0o22)],
        'FILE': [r.SavedFile(1, 'chardev', 0, 0, 0o20666, 0, 0, 0, '/dev/null', b'x'),
                 r.FdTable(1, (r.Fd(0, 1, 0), r.Fd(1, 1, 1)))],
        'MEM ': [],
    }


def write_image(spool: Path, parts: dict[str, list[Record]], data: list[bytes], **changes: Any) -> Path:
    """Publish an image of these records, with `data` one after the other in data-0.img, each from a new page on."""
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        for code, records in parts.items():
            for one in records:
                writer.part(code).write(one)
        for chunk in data:
            writer.data.add([chunk])
        writer.publish(manifest(**changes))
    return spool / IMAGE


def small_image(spool: Path) -> Path:
    """A sound image of one process with one page of memory."""
    parts = tree_records(task())
    parts['MEM '] = [
        r.Backing(1, '/nowhere/sample', 1, 2, 3, 4, 0o100755, 1, (r.Extent(0, PAGE, 5),)),
        r.Mm(1, (0,) * 11, struct.pack('<4Q', 6, 4096, 0, 0), 1, 1, 0),
        vma(0x10000, 2),
        r.PageRuns(r.OF_MM, 1, (r.PageRun(0x10000, 1, 0, 0),)),
    ]
    return write_image(spool, parts, [b'\x5a' * PAGE, b'#!/bi'])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""fanotify groups that are refused, or whose marks lead elsewhere at the restart."""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckptd.errors import CkptError, Refused
from ckptd.image.manifest import read_manifest
from ckptd.image.records import SavedFile
from ckptd.kernel.fanotify import (
    FAN_MARK_FILESYSTEM,
    FAN_MARK_MOUNT,
    FAN_OPEN_PERM,
    FanotifyMark,
    fanotify_init,
    group_of,
    marks_of,
    parse_mark,
    set_mark,
)
from ckptd.kernel.fdinfo import list_fds, read_fdinfo
from ckptd.kernel.fhandle import FileHandle
from ckptd.objects.files.fanotify import Fanotify
from tests.lib.altered import read_part, write_part
from tests.worker.driver import DirectWorker, Place
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

FAN_CLASS_CONTENT, FAN_CLOSE_WRITE, FAN_OPEN = 4, 8, 0x20


def marked(path: Path, *marks: FanotifyMark, flags: int = 0) -> int:
    group = fanotify_init(flags, os.O_RDONLY)
    file = os.open(path, os.O_PATH)
    for mark in marks:
        set_mark(group, mark, file)
    os.close(file)
    return group


def test_permission_events_are_refused(place: Place, forked: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    pid = forked(lambda: marked(tmp_path / 'file', FanotifyMark(0, 0, FAN_OPEN_PERM, 0), flags=FAN_CLASS_CONTENT))
    with pytest.raises(Refused, match='decides about accesses of other programs'):
        place.checkpoint(pid)


def test_events_that_wait_are_a_warning(place: Place, forked: Callable[..., int], tmp_path: Path) -> None:
    def work() -> None:
        marked(tmp_path / 'file', FanotifyMark(0, 0, FAN_CLOSE_WRITE, 0))
        (tmp_path / 'file').write_text('x')
    (tmp_path / 'file').touch()
    image = place.checkpoint(forked(work))
    [row] = [row for row in read_manifest(image).warnings if 'fanotify' in row.reason]
    assert (row.errno, row.severity) == ('ENOMSG', 'warning')


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which nobody else uses."""
    path = tmp_path / 'mounted'
    path.mkdir()
    assert os.system(f'mount -t tmpfs ckptd-test {path}') == 0
    yield path
    assert os.system(f'umount -l {path}') == 0


def test_marks_of_mounts_and_file_systems(place: Place, forked: Callable[..., int], mounted: Path) -> None:
    pid = forked(lambda: marked(mounted, FanotifyMark(FAN_MARK_MOUNT, 0, FAN_CLOSE_WRITE, 0),
                                FanotifyMark(FAN_MARK_FILESYSTEM, 0, FAN_OPEN, FAN_CLOSE_WRITE)))

    def look() -> tuple[Any, ...]:
        for fd in list_fds(pid):
            info = read_fdinfo(pid, fd)
            if 'fanotify' in info.fields:
                return group_of(info), sorted(marks_of(info))
        raise AssertionError('no group')
    before = look()
    assert [mark.on for mark in before[1]] == [FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM]
    image = place.checkpoint(pid, after='kill')
    os.waitpid(pid, 0)
    with DirectWorker() as worker:
        assert worker.run(place.request(0, operation='restore', image=image.name))['root'] == pid
    assert look() == before


def test_a_marked_file_that_is_another(generation: Callable[..., Generation]) -> None:
    tree = generation('fanotify')
    image = tree.kill()
    path = tree.victim.directory / 'file'
    path.rename(path.with_name('moved'))
    with pytest.raises(Refused, match='file, which has a fanotify mark, is missing'):
        tree.restore(image)
    path.touch()
    with pytest.raises(Refused, match='file, which has a fanotify mark, is another file'):
        tree.restore(image)
    tree.restore(image, changed_files='accept')
    tree.finish()


@pytest.mark.parametrize('change', [
    lambda one: replace(one, flags=0xFFFFFFFF), lambda one: replace(one, event_flags=0xFFFFFFFF),
    lambda one: replace(one, marks=tuple(replace(mark, on=3) for mark in one.marks)),
    lambda one: replace(one, marks=tuple(replace(mark, mask=1 << 63) for mark in one.marks)),
    lambda one: replace(one, marks=tuple(replace(mark, mask=FAN_OPEN_PERM) for mark in one.marks))])
def test_a_crafted_image(generation: Callable[..., Generation], change: Callable[[Fanotify], Fanotify]) -> None:
    tree = generation('fanotify')
    image = tree.kill()
    records = [replace(one, data=change(Fanotify.decode(one.data)).encode())
               if isinstance(one, SavedFile) and one.kind == 'fanotify' else one for one in read_part(image, 'FILE')]
    write_part(image, 'FILE', records)
    with pytest.raises(CkptError):
        tree.restore(image)


def test_rows_of_fdinfo() -> None:
    handle = FileHandle(1, struct.pack('>Q', 0x69F90400C275B5B4))
    assert parse_mark('ino:4f969 sdev:800013 mflags:40 mask:3b ignored_mask:40000000 fhandle-bytes:8 fhandle-type:1 '
                      'f_handle:69f90400c275b5b4') == FanotifyMark(
        0, 0x40, 0x3B, 0x40000000, 0x4F969, os.makedev(8, 0x13), 0, handle)
    assert parse_mark('mnt_id:12 mflags:0 mask:38 ignored_mask:0') == FanotifyMark(
        FAN_MARK_MOUNT, 0, 0x38, 0, mount=0x12)
    assert parse_mark('sdev:800013 mflags:0 mask:3b ignored_mask:0') == FanotifyMark(
        FAN_MARK_FILESYSTEM, 0, 0x3B, 0, device=os.makedev(8, 0x13))

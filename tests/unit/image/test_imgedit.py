# SPDX-License-Identifier: LGPL-2.1-or-later
"""The editor of images: what it writes is a sound image that differs in nothing but the edit."""

import dataclasses
from pathlib import Path

import pytest

from ckptd.image.grammar import read_records
from ckptd.image.manifest import read_manifest
from ckptd.image.reader import part_code
from ckptd.image.records import PARTS, Credentials, Fd, FdTable, SavedFile
from ckptd.image.verify import verify
from ckptd.objects.files.memfd import Memfd
from tests.lib.imgedit import FIELDS, KINDS, NAMES, ImageStream
from tests.unit.image.samples import IMAGE, small_image
from tests.unit.image.test_archive import contents, receive, stream_of


@pytest.fixture
def original(tmp_path: Path) -> Path:
    (tmp_path / 'origin').mkdir()
    return small_image(tmp_path / 'origin')


def imported(stream: bytes, directory: Path) -> Path:
    """The image that a stream becomes."""
    spool = directory / 'spool'
    spool.mkdir()
    manifest = receive(stream, spool)
    assert verify(spool / manifest.image) == []
    return spool / manifest.image


def records_in(image: Path, name: str) -> list[object]:
    code = part_code(NAMES[name])
    with (image / PARTS[code]).open('rb') as file:
        return [one for one in read_records(file, code.encode(), name) if type(one) is NAMES[name]]


def test_what_is_not_edited_stays(original: Path, tmp_path: Path) -> None:
    stream = stream_of(original)
    copy = imported(ImageStream.load(stream).dump(), tmp_path)
    assert copy.name == IMAGE
    assert contents(copy) == contents(original)


def test_edits(original: Path, tmp_path: Path) -> None:
    image = ImageStream.load(stream_of(original))
    assert image.alter('Credentials', uids=(5,) * 4) == 1
    assert image.alter('Credentials', lambda one: one.vpid == 99, uids=(6,) * 4) == 0
    assert image.change('SavedFile', lambda file: None) == 1
    extent = image.add_data(b'content')
    assert (extent.part, extent.length) == (1, 7)
    memfd = Memfd('made', 1, 2, 7, 0o100777, 5, 5, 0, 0, (), ())
    image.add(SavedFile(1, 'memfd', 2, 0, 0o100777, 0, 0, 0, '/memfd:made', memfd.encode()))
    image.claim(command='edited')
    edited = imported(image.dump(), tmp_path)
    [credentials] = records_in(edited, 'Credentials')
    assert isinstance(credentials, Credentials)
    assert credentials.uids == (5,) * 4
    assert read_manifest(edited).command == 'edited'
    assert (edited / 'data-1.img').read_bytes().rstrip(b'\0') == b'content'
    assert [one.kind for one in records_in(edited, 'SavedFile')] == ['memfd']    # type: ignore[attr-defined]


def test_payloads_of_kinds(original: Path) -> None:
    image = ImageStream.load(stream_of(original))
    memfd = Memfd('made', 1, 2, 7, 0o100777, 5, 5, 0, 0, (), ())
    image.add(SavedFile(2, 'memfd', 2, 0, 0o100777, 0, 0, 0, '/memfd:made', memfd.encode()))
    assert image.alter_kind('memfd', size=1 << 40) == 1
    assert image.alter_kind('memfd', lambda file: file.file_id == 1, size=0) == 0
    [(file, payload)] = image.files('memfd')
    assert (file.file_id, payload) == (2, dataclasses.replace(memfd, size=1 << 40))


def test_order(original: Path) -> None:
    image = ImageStream.load(stream_of(original))
    image.add(FdTable(3, ()), FdTable(2, (Fd(0, 1, 0),)))
    image.sort('FdTable', lambda table: table.files_id)
    assert [table.files_id for table in image.every('FdTable')] == [1, 2, 3]
    assert [type(one).__name__ for one in image.records['FILE']] == ['SavedFile', 'FdTable', 'FdTable', 'FdTable']


def test_every_record_has_a_name() -> None:
    assert {'Header', 'Credentials', 'SavedFile', 'Vma', 'PageRuns'} <= NAMES.keys()
    assert {'regular', 'fifo', 'pipe', 'timerfd'} <= KINDS.keys()
    assert FIELDS['Fs'] == ('fs_id', 'cwd', 'root', 'umask')
    assert FIELDS['timerfd'][0] == 'clock'

# SPDX-License-Identifier: LGPL-2.1-or-later
"""verify: any flipped bit, truncated or missing file is found, and so is a sound file that says what cannot be."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd.errors import Cancelled, ImageDamaged
from ckptd.image import records as r
from ckptd.image.grammar import Record, encode_end, encode_header, encode_record
from ckptd.image.manifest import NAME, Part, encode_manifest, read_manifest
from ckptd.image.references import MAX_DAMAGES
from ckptd.image.verify import verify, verify_data, verify_records
from tests.unit.image.samples import IMAGE, PAGE, small_image, task, tree_records, vma, write_image

LAYOUT = (0,) * 11
FILES = [*r.PARTS.values(), 'data-0.img', 'manifest.json']


@pytest.fixture
def image(spool: Path) -> Path:
    return small_image(spool)


def test_a_sound_image_has_no_damage(image: Path) -> None:
    assert verify(image) == []


def strides(bits: int) -> range:
    """Some eighty of so many, of every place in a byte. The tests of grammar and manifest flip and cut every one."""
    return range(0, bits, 1 + bits // 80 // 2 * 2)


@pytest.mark.parametrize('name', FILES)
def test_flipped_bits(image: Path, name: str) -> None:
    fd = os.open(image / name, os.O_RDWR)
    try:
        size = os.fstat(fd).st_size
        for bit in strides(8 * size):
            old = os.pread(fd, 1, bit // 8)
            os.pwrite(fd, bytes([old[0] ^ 1 << bit % 8]), bit // 8)
            assert verify(image), f'bit {bit % 8} of byte {bit // 8} of {name}'
            os.pwrite(fd, old, bit // 8)
    finally:
        os.close(fd)
    assert verify(image) == []


@pytest.mark.parametrize('name', r.PARTS.values())
def test_an_empty_part_that_the_manifest_knows(image: Path, name: str) -> None:
    (image / name).write_bytes(b'')
    there = read_manifest(image)
    parts = {**there.parts, name: Part(size=0, sha256=hashlib.sha256(b'').hexdigest())}
    (image / NAME).write_bytes(encode_manifest(msgspec.structs.replace(there, parts=parts)))
    assert verify(image) == [f'{name}: cut short in its header']


def test_progress(image: Path) -> None:
    counts: list[int] = []
    assert verify(image, counts.append) == []
    assert sum(counts) == read_manifest(image).size
    assert counts.count(0) > 10         # once a record


@pytest.mark.parametrize('name', FILES)
def test_truncated_prefixes(image: Path, name: str) -> None:
    path = image / name
    content = path.read_bytes()
    for size in strides(len(content)):
        path.write_bytes(content[:size])
        assert any(name in line for line in verify(image)), f'{size} bytes of {name}'
    path.write_bytes(content + b'\0')
    assert any(name in line for line in verify(image))


@pytest.mark.parametrize('name', FILES)
def test_a_missing_file(image: Path, name: str) -> None:
    (image / name).unlink()
    assert f'{name} is missing' in verify(image)


@pytest.mark.parametrize('name', FILES)
def test_a_file_that_is_none(image: Path, name: str) -> None:
    (image / name).rename(image.parent / 'elsewhere')
    (image / name).symlink_to(image.parent / 'elsewhere')
    assert any(name in line for line in verify(image))
    (image / name).unlink()
    os.mkfifo(image / name)
    assert f'{name} is not a regular file' in verify(image)


def test_a_file_too_many(image: Path) -> None:
    (image / 'data-1.img').touch()
    (image / 'note').touch()
    assert verify(image) == ['data-1.img does not belong to the image', 'note does not belong to the image']


def test_all_damages_at_once(image: Path) -> None:
    (image / 'tree.img').unlink()
    (image / 'data-0.img').write_bytes(bytes(2 * PAGE))
    (image / 'files.img').write_bytes(b'CKPTDIMG')
    damages = verify(image)
    assert [line.split()[0].rstrip(':') for line in damages] == ['files.img', 'tree.img', 'files.img', 'data-0.img']


def test_without_a_manifest_the_rest_is_still_looked_at(image: Path) -> None:
    (image / 'manifest.json').unlink()
    assert verify(image) == ['manifest.json is missing']


def test_no_image_at_all(tmp_path: Path) -> None:
    assert len(verify(tmp_path / 'none')) == 1
    assert len(verify(tmp_path)) == 1 + len(r.PARTS)


# ---------------------------------------------------------------- records that are sound bytes

def damages_of(spool: Path, parts: dict[str, list[Record]], pages: int = 1, **manifest: Any) -> list[str]:
    return verify(write_image(spool, parts, [bytes(pages * PAGE)], **manifest))


def image_parts(*memory: Record) -> dict[str, list[Record]]:
    parts = tree_records(task())
    parts['MEM '] = [r.Mm(1, LAYOUT, b'', 0, 1, 0), *memory]
    return parts


RANGE = r.PageRun(0x10000, 1, 0, 0)


@pytest.mark.parametrize(('memory', 'damage'), [
    ([vma(0x10000, 0)], 'Vma 10000-10000 of mm 1: not a range of pages'),
    ([vma(0x10001, 1)], 'Vma 10001-11001 of mm 1: not a range of pages'),
    ([vma(0x20000, 1), vma(0x10000, 1)], 'Vma 10000-11000 of mm 1: 10000 is not in ascending order'),
    ([vma(0x10000, 2), vma(0x11000, 1)], 'Vma 11000-12000 of mm 1: 11000 is not in ascending order'),
    ([vma(0x10000, 1, mm_id=2)], 'Vma 2: no Mm 2'),
    ([vma(0x10000, 1, kind=r.FILE_PRIVATE, object=4)], 'Vma 10000-11000 of mm 1: no Backing 4'),
    ([vma(0x10000, 1, kind=r.SHARED_MEMORY, object=4)], 'Vma 10000-11000 of mm 1: no SharedMemory 4'),
    ([r.Mm(1, LAYOUT, b'', 0, 1, 0)], 'Mm 1: its id is taken'),
    ([r.Mm(0, LAYOUT, b'', 0, 1, 0)], 'Mm 0: its id is 0'),
    ([r.PageRuns(r.OF_MM, 3, (RANGE,))], 'PageRuns of Mm 3: no Mm 3'),
    ([r.PageRuns(9, 1, (RANGE,))], 'PageRuns of 1: owner kind 9'),
    ([r.PageRuns(r.OF_MM, 1, (RANGE, RANGE))], 'PageRuns of Mm 1: 10000 is not in ascending order'),
    ([r.PageRuns(r.OF_MM, 1, (replace(RANGE, pages=2),))], 'PageRuns of Mm 1: bytes 0 to 8192 are not in data-0.img'),
    ([r.PageRuns(r.OF_MM, 1, (replace(RANGE, part=7),))], 'PageRuns of Mm 1: bytes 0 to 4096 are not in data-7.img'),
    ([r.PageRuns(r.OF_MM, 1, (replace(RANGE, offset=8),))],
     'PageRuns of Mm 1: byte 8 of data-0.img is not a page boundary'),
    ([r.PageRuns(r.OF_MM, 1, (replace(RANGE, pages=0),))], 'PageRuns of Mm 1: not a range of pages'),
    ([r.Backing(1, '/x', 0, 0, 0, 0, 0, 1, (r.Extent(0, PAGE, 1),))],
     'Backing 1: bytes 4096 to 4097 are not in data-0.img'),
    ([r.GuardRegions(1, (r.Range(0x2000, 0x1000),))], 'GuardRegions 2000-1000 of mm 1: not a range of pages'),
])
def test_memory_that_cannot_be(spool: Path, memory: Iterable[Record], damage: str) -> None:
    assert damages_of(spool, image_parts(*memory)) == [damage]


def test_tasks_that_name_nothing(spool: Path) -> None:
    parts = image_parts()
    parts['TREE'][2] = task(mm_id=2, files_id=3, fs_id=4, sighand_id=5, parent=6)
    assert damages_of(spool, parts) == [
        'TaskRecord 7: no TaskRecord 6', 'TaskRecord 7: no SignalActions 5',
        'TaskRecord 7: no Fs 4',
        'TaskRecord 7: no FdTable 3', 'TaskRecord 7: no Mm 2']


@pytest.mark.parametrize(('attributes', 'damage'), [
    ([r.TaskAttribute(7, 5, 'x', b'')] * 2, 'TaskAttribute x of 7: it is there twice'),
    ([r.TaskAttribute(7, 5, 'x', b''), r.TaskAttribute(7, 4, 'x', b'')], ''),
    ([r.TaskAttribute(7, 6, 'x', b'')], 'TaskAttribute x of 7: it belongs to nothing'),
    ([r.TaskAttribute(0, 5, 'x', b'')], 'TaskAttribute x of 0: it belongs to nothing'),
    ([r.TaskAttribute(9, 5, 'x', b'')], 'TaskAttribute x of 9: no TaskRecord 9'),
    ([r.TaskAttribute(9, 1, 'x', b'')], 'TaskAttribute x of 9: no Mm 9')])
def test_attributes(spool: Path, attributes: list[Record], damage: str) -> None:
    parts = image_parts()
    parts['TASK'] += attributes
    assert damages_of(spool, parts) == [damage] * bool(damage)


def test_a_living_task_without_registers(spool: Path) -> None:
    parts = image_parts()
    parts['TASK'] = [one for one in parts['TASK'] if not isinstance(one, r.Registers)]
    assert damages_of(spool, parts) == ['TaskRecord 7: no Registers 7']


def test_a_zombie_needs_none(spool: Path) -> None:
    parts = image_parts()
    parts['TREE'][2] = task(state=ord('Z'), mm_id=0)
    parts['TASK'] = [one for one in parts['TASK'] if isinstance(one, r.Fs | r.SignalActions)]
    assert damages_of(spool, parts) == []


def test_an_fd_of_no_file(spool: Path) -> None:
    parts = image_parts()
    parts['FILE'][1] = r.FdTable(1, (r.Fd(5, 8, 0),))
    assert damages_of(spool, parts) == ['FdTable 1: fd 5: no SavedFile 8']


def test_counts_that_do_not_agree(spool: Path) -> None:
    assert damages_of(spool, image_parts(), tasks=2, root=9) == [
        'manifest.json: 2 tasks in 1 processes, but there are 1 in 1',
        'manifest.json: the root 9 is not a task of the image']


def test_ids_and_tasks_that_differ(spool: Path) -> None:
    parts = image_parts()
    parts['TREE'][1] = r.TaskIds((7, 8), (7, 7), (1, 1), (7, 7), (7,))
    assert damages_of(spool, parts) == [
        'TaskIds: lists of 2, 2, 2, 2, 1 ids', 'tree.img: TaskIds and TaskRecord records differ']


def test_a_record_in_the_wrong_part(spool: Path) -> None:
    parts = image_parts()
    parts['MEM '].append(r.Limits(7, (r.Limit(0, 0),) * 16))
    assert damages_of(spool, parts) == ['memory.img: a Limits record does not belong there']


def test_two_headers(spool: Path) -> None:
    parts = image_parts()
    parts['TREE'].append(parts['TREE'][0])
    assert damages_of(spool, parts) == ['tree.img: 2 headers']


def test_a_flood_of_damages_is_cut(spool: Path) -> None:
    runs = tuple(r.PageRun(1, 1, 9, 1) for _ in range(3 * MAX_DAMAGES))
    assert len(damages_of(spool, image_parts(r.PageRuns(r.OF_MM, 1, runs)))) == MAX_DAMAGES


def test_an_id_that_is_no_file_of_the_spool(image: Path) -> None:
    """A record file with a sound grammar, not the one of the manifest."""
    (image / 'files.img').write_bytes(encode_header(b'FILE') + encode_record(r.FdTable(1, ())) + encode_end(1))
    assert any('files.img has' in line for line in verify(image))
    assert image.name == IMAGE


def test_damaged_is_an_error_with_a_status() -> None:
    assert ImageDamaged.exit_status == 6


def test_records_and_data_apart(image: Path) -> None:
    """The digests of data parts alone take time; both together are all there is."""
    data, records = image / 'data-0.img', image / 'tree.img'
    data.write_bytes(bytes(data.stat().st_size))
    assert verify_records(image) == []
    assert verify_data(image) == ['data-0.img: its digest does not match its content'] == verify(image)
    records.write_bytes(records.read_bytes()[:-1] + b'x')
    assert all('tree.img' in line for line in verify_records(image))
    assert len(verify_data(image)) == 1


def test_damage_of_the_data_is_told_once(image: Path) -> None:
    """What the records say already."""
    os.truncate(image / 'data-0.img', 1)
    assert any('data-0.img has 1 bytes' in line for line in verify_records(image))
    assert verify_data(image) == []
    (image / 'manifest.json').unlink()
    assert verify_data(image) == []
    assert verify_data(image / 'nothing') == []


def test_progress_and_cancel_of_the_digests(image: Path) -> None:
    done: list[int] = []
    verify_data(image, done.append)
    assert sum(done) == (image / 'data-0.img').stat().st_size

    def cancel(count: int) -> None:
        raise Cancelled('enough')

    with pytest.raises(Cancelled):
        verify_data(image, cancel)

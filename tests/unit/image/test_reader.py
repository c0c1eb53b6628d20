# SPDX-License-Identifier: LGPL-2.1-or-later
"""ImageReader: records by type and id, memory by address, and damage where an image lies."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.errors import ImageDamaged
from ckptd.image import records as r
from ckptd.image.grammar import Record
from ckptd.image.reader import ImageReader, runs_between
from tests.unit.image.samples import PAGE, small_image, task, tree_records, write_image


def test_records_by_type_and_id(spool: Path) -> None:
    with ImageReader(small_image(spool)) as reader:
        assert reader.header.root == 7
        [one] = reader.tasks
        assert (one.vpid, one.vppid, one.is_leader, one.record.comm) == (7, 1, True, 'sample')
        assert reader.get(r.Registers, 7).machine == 62
        assert dict(reader.table(r.Fs)) == {1: r.Fs(1, '/', '/', 0o22)}
        assert [one.link for one in reader.every(r.SavedFile)] == ['/dev/null']
        assert reader.every(r.Limits) == []
        with pytest.raises(ImageDamaged, match='no Limits 7'):
            reader.get(r.Limits, 7)


def test_memory_by_address(spool: Path) -> None:
    with ImageReader(small_image(spool)) as reader:
        memory = reader.memory(1)
        assert [vma.start for vma in memory.vmas] == [0x10000]
        assert reader.read_memory(memory, 0xFFFE, 4) == b'\0\0ZZ'
        assert reader.read_memory(memory, 0x10FFE, 4) == b'ZZ\0\0'
        assert b''.join(reader.read_extent(reader.get(r.Backing, 1).content[0])) == b'#!/bi'


def test_processes_have_their_leader_first(spool: Path) -> None:
    with ImageReader(write_image(spool, tree_records(task(7), task(3, parent=7)), [], tasks=2)) as reader:
        assert {vtgid: [one.vpid for one in tasks] for vtgid, tasks in reader.processes.items()} == {7: [7, 3]}


def test_an_extent_is_read_in_small_pieces(spool: Path) -> None:
    image = write_image(spool, {}, [bytes(3 << 20)])
    with ImageReader(image) as reader:
        assert max(len(chunk) for chunk in reader.read_extent(r.Extent(0, 0, 3 << 20))) == 1 << 20
        # a length that no file has: damage at its end, and no more memory than for a sound one
        with pytest.raises(ImageDamaged, match=r'data-0\.img ends at byte 3145728'):
            sum(len(chunk) for chunk in reader.read_extent(r.Extent(0, 0, (1 << 64) - 1)))
        with pytest.raises(ImageDamaged, match='cannot be read'):
            next(reader.read_extent(r.Extent(0, (1 << 64) - PAGE, 1)))
        with pytest.raises(ImageDamaged, match=r'data-5\.img'):
            next(reader.read_extent(r.Extent(5, 0, 1)))


@pytest.mark.parametrize(('index', 'wrong', 'words'), [
    (1, r.TaskIds((7,), (7, 8), (1,), (7,), (7,)), 'differ in length'),
    (1, r.TaskIds((8,), (8,), (1,), (8,), (8,)), 'no TaskRecord 8'),
    (1, r.TaskIds((7, 7), (7, 7), (1, 1), (7, 7), (7, 7)), 'TaskIds and TaskRecord records differ'),
    (1, r.TaskIds((), (), (), (), ()), 'TaskIds and TaskRecord records differ'),
    (0, r.TaskIds((), (), (), (), ()), '0 headers'),
])
def test_a_tree_that_lies(spool: Path, index: int, wrong: Record, words: str) -> None:
    parts = tree_records(task())
    parts['TREE'][index] = wrong
    with ImageReader(write_image(spool, parts, [])) as reader, pytest.raises(ImageDamaged, match=words):
        assert reader.header is reader.tasks


def test_two_records_of_one_id(spool: Path) -> None:
    parts = tree_records(task())
    parts['TASK'] += [r.Fs(1, '/', '/', 0)]
    with ImageReader(write_image(spool, parts, [])) as reader, pytest.raises(ImageDamaged, match='same fs_id'):
        reader.get(r.Fs, 1)


def test_a_closed_reader_has_no_fd(spool: Path) -> None:
    reader = ImageReader(small_image(spool))
    fd = reader.data_fd(0)
    reader.close()
    reader.close()
    with pytest.raises(OSError, match='Bad file'):
        os.fstat(fd)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=6), st.integers(0, 30), st.integers(1, 10))
def test_runs_between(gaps: list[tuple[int, int]], start: int, length: int) -> None:
    at, runs = 0, []
    for gap, pages in gaps:
        runs.append(r.PageRun((at + gap) * PAGE, pages, 0, 0))
        at += gap + pages
    low, high = start * PAGE, (start + length) * PAGE
    assert list(runs_between(runs, low, high)) == [
        run for run in runs if run.start < high and run.start + run.pages * PAGE > low]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What forked processes have the same is in the image once, and each reads its own memory from it."""

import ctypes
import io
import mmap
import os
import random
import tarfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.dump.copy import CHUNK_SIZE, Copier
from ckptd.image.cores.export import export
from ckptd.image.pages import DataWriter
from ckptd.image.reader import ImageReader
from ckptd.image.records import PAGE, PageRun, ThreadPointers
from ckptd.image.verify import verify
from ckptd.kernel.memory import Mem
from ckptd.kernel.ranges import overlaps, without
from tests.lib.victim import Victim
from tests.worker.driver import Place

pytestmark = [pytest.mark.needs('ptrace', 'gcc')]

HEAP = 8192         # pages of the victim's
CHUNK = CHUNK_SIZE // PAGE


@pytest.mark.needs('root')
def test_a_forked_tree(victim: Callable[..., Victim], tmp_path: Path) -> None:
    running = victim('forked')
    image = Place(tmp_path).make().checkpoint(running.pid)
    assert verify(image) == []
    with ImageReader(image) as reader:
        statistics = reader.manifest.statistics
        # changed: 100 pages by the second child, 64 by the grandchild, 9 by each; and what the C library keeps
        assert HEAP < statistics.pages_written < HEAP + 100 + 64 + 4 * 9 + 400
        assert reader.manifest.parts['data-0.img'].size // PAGE <= statistics.pages_written + 100
        assert len(reader.processes) == 4
        for vtgid, tasks in reader.processes.items():
            memory = reader.memory(tasks[0].record.mm_id)
            assert sum(run.pages for run in memory.runs) > HEAP - 600
            rseq = reader.get(ThreadPointers, vtgid).rseq       # the kernel has written the CPU's number there since
            with Mem(vtgid) as mem:
                for run in memory.runs:
                    start, length = run.start, min(run.pages, 512) * PAGE
                    if not start <= rseq < start + length:
                        assert reader.read_memory(memory, start, length) == mem.read(start, length)
        sink = io.BytesIO()
        export(reader, sink)
        with tarfile.open(fileobj=io.BytesIO(sink.getvalue())) as cores:
            sizes = sorted(member.size for member in cores.getmembers() if 'core' in member.name)
        assert len(sizes) == 4
        assert sizes[0] > (HEAP - 600) * PAGE       # each core has all
    running.finish()


# ---------------------------------------------------------------- copying

PAGES = 40 * CHUNK + 5
PATTERNS: dict[str, Collection[int]] = {
    'nothing': (),
    'everything': range(PAGES),
    'every other page': range(0, PAGES, 2),
    'the ends of chunks': [page for page in range(PAGES) if page % CHUNK in (0, CHUNK - 1)],
    'one page': (3 * CHUNK + 7,),
    'the last page': (PAGES - 1,),
    'at random': random.Random(1).sample(range(PAGES), 300),
    'all of some chunks': [page for page in range(PAGES) if page // CHUNK % 10 == 3]}


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataWriter]:
    writer = DataWriter(tmp_path, 0)
    yield writer
    writer.close()


@pytest.mark.parametrize('pattern', PATTERNS)
def test_what_has_changed_is_copied(forked: Callable[..., int], data: DataWriter, pattern: str) -> None:
    memory = mmap.mmap(-1, PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(PAGES):
        memory[page * PAGE:page * PAGE + 8] = page.to_bytes(8, 'little')
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    origin = forked()
    for page in PATTERNS[pattern]:
        memory[(page + 1) * PAGE - 1] = 0xFF
    counts: list[int] = []
    with Mem(os.getpid()) as mine, Mem(origin) as theirs, Copier(data, counts.append) as copier:
        first = copier.copy_memory(theirs, [(start, start + PAGES * PAGE)])
        # a run that begins inside another, and a gap
        cut = [PageRun(start, CHUNK + 3, 0, first[0].offset),
               PageRun(start + 2 * CHUNK * PAGE, PAGES - 2 * CHUNK, 0, first[0].offset + 2 * CHUNK * PAGE)]
        runs = copier.copy_changed(mine, theirs, cut)
        copier.flush()
    length = sum(run.pages for run in cut)
    assert sum(counts) == (PAGES + length) * PAGE
    seen: list[int] = []
    shared = 0
    for run in runs:
        at = (run.start - start) // PAGE
        seen += range(at, at + run.pages)
        shared += run.pages * (run.offset < PAGES * PAGE)
        assert os.pread(data.fileno(), run.pages * PAGE, run.offset) == memory[at * PAGE:(at + run.pages) * PAGE]
        if run.offset < PAGES * PAGE:
            assert run.offset == at * PAGE
    assert seen == [*range(CHUNK + 3), *range(2 * CHUNK, PAGES)]
    changed = len(set(seen) & set(PATTERNS[pattern]))
    assert data.size == (PAGES + length - shared) * PAGE
    if pattern in ('nothing', 'one page', 'the last page', 'the ends of chunks', 'at random'):
        assert shared == length - changed       # no chunk went by unseen
    if pattern == 'nothing':
        assert runs == cut


# ---------------------------------------------------------------- ranges

def ranges() -> st.SearchStrategy[list[tuple[int, int]]]:
    edges = st.lists(st.integers(0, 40), unique=True, max_size=12).map(sorted)
    return edges.map(lambda found: list(zip(found[::2], found[1::2], strict=False)))


def numbers(of: list[tuple[int, int]]) -> set[int]:
    return {number for start, end in of for number in range(start, end)}


@given(ranges(), ranges())
def test_ranges(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    both = list(overlaps(first, second))
    assert numbers([(one.start, one.end) for one in both]) == numbers(first) & numbers(second)
    for one in both:
        assert first[one.first][0] <= one.start < one.end <= first[one.first][1]
        assert second[one.second][0] <= one.start < one.end <= second[one.second][1]
    rest = list(without(first, second))
    assert numbers(rest) == numbers(first) - numbers(second)
    assert all(start < end for start, end in rest)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cores from images made by hand: what a PT_LOAD has of each kind of VMA, holes, tar streams, hostile images."""

import io
import os
import struct
import subprocess
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from ckptd.errors import CkptError, ImageDamaged, NoSuchTarget
from ckptd.image import records as r
from ckptd.image.cores.elf import EM_X86_64, PN_XNUM, PT_LOAD, Phdr, encode_headers, headers_size
from ckptd.image.cores.export import export, write_core
from ckptd.image.cores.plan import plan_core
from ckptd.image.grammar import Record
from ckptd.image.reader import ImageReader
from tests.unit.image.samples import PAGE, task, tree_records, vma, write_image

BASE = 0x10000
Loads = list[tuple[int, int, bytes]]    # address, p_memsz, bytes in the file


def page(letter: str) -> bytes:
    return letter.encode() * PAGE


def run(start: int, number: int, pages: int = 1) -> r.PageRun:
    """Pages of data-0.img from page `number` on."""
    return r.PageRun(start, pages, 0, number * PAGE)


def image_of(spool: Path, memory: list[Record], data: list[bytes], *tasks: r.TaskRecord) -> Path:
    parts = tree_records(*(tasks or (task(),)))
    parts['MEM '] = [r.Mm(1, (0,) * 11, struct.pack('<4Q', 6, PAGE, 0, 0), 0, 1, 0), *memory]
    return write_image(spool, parts, data, tasks=len(tasks) or 1)


def loads_of(image: Path, out: Path) -> Loads:
    with ImageReader(image) as reader, out.open('wb') as file:
        write_core(reader, 7, file)
    with out.open('rb') as file:
        return [(one['p_vaddr'], one['p_memsz'], one.data()) for one in ELFFile(file).iter_segments()
                if one['p_type'] == 'PT_LOAD']


@pytest.fixture
def loads(spool: Path, tmp_path: Path) -> Callable[..., Loads]:
    return lambda memory, data: loads_of(image_of(spool, memory, data), tmp_path / 'core')


def test_private_memory_is_whole_or_absent(loads: Callable[..., Loads]) -> None:
    memory = [vma(BASE, 3), vma(BASE + 4 * PAGE, 2), r.PageRuns(r.OF_MM, 1, (run(BASE + PAGE, 0),))]
    assert loads(memory, [page('a')]) == [
        (BASE, 3 * PAGE, page('\0') + page('a') + page('\0')), (BASE + 4 * PAGE, 2 * PAGE, b'')]


def test_a_run_over_two_vmas(loads: Callable[..., Loads]) -> None:
    memory = [vma(BASE, 1), vma(BASE + PAGE, 2, protection=5), r.PageRuns(r.OF_MM, 1, (run(BASE, 0, 2),))]
    assert loads(memory, [page('a') + page('b')]) == [
        (BASE, PAGE, page('a')), (BASE + PAGE, 2 * PAGE, page('b') + page('\0'))]


def test_shared_memory_by_its_offset(loads: Callable[..., Loads]) -> None:
    memory = [r.SharedMemory(4, r.SHMEM, 4 * PAGE, '', 0, 0, 0, 0, 0, 0),
              r.PageRuns(r.OF_SHARED_MEMORY, 4, (run(PAGE, 0, 2),)),
              vma(BASE, 2, kind=r.SHARED_MEMORY, object=4, offset=2 * PAGE),
              vma(BASE + 2 * PAGE, 1, kind=r.SHARED_MEMORY, object=4, offset=0)]
    assert loads(memory, [page('a') + page('b')]) == [
        (BASE, 2 * PAGE, page('b') + page('\0')), (BASE + 2 * PAGE, PAGE, b'')]


@pytest.mark.parametrize('changes', [{'kind': r.VVAR}, {'kind': r.VSYSCALL}, {'vm_flags': 'rd wr dd'}])
def test_what_never_has_data(loads: Callable[..., Loads], changes: dict[str, int | str]) -> None:
    memory = [vma(BASE, 1, **changes), r.PageRuns(r.OF_MM, 1, (run(BASE, 0),))]
    assert loads(memory, [page('a')]) == [(BASE, PAGE, b'')]


# ---------------------------------------------------------------- files

@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'file'
    path.write_bytes(b'\x7fELF'.ljust(PAGE, b'x') + page('y') + page('z') + b'tail')
    return path


def backing(file: Path, **changes: object) -> r.Backing:
    at = file.stat()
    made = r.Backing(1, str(file), at.st_dev, at.st_ino, at.st_size, at.st_mtime_ns, at.st_mode, 0, ())
    return replace(made, **changes)  # type: ignore[arg-type]


def private(pages: int, offset: int = 0, start: int = BASE) -> r.Vma:
    return vma(start, pages, kind=r.FILE_PRIVATE, object=1, offset=offset)


def test_an_unchanged_file_has_its_elf_header(loads: Callable[..., Loads], file: Path) -> None:
    memory = [backing(file), private(2), private(2, PAGE, BASE + 2 * PAGE),
              replace(private(2, 0, BASE + 4 * PAGE), kind=r.FILE_SHARED)]
    content = file.read_bytes()
    assert loads(memory, []) == [
        (BASE, 2 * PAGE, content[:PAGE]), (BASE + 2 * PAGE, 2 * PAGE, b''), (BASE + 4 * PAGE, 2 * PAGE, content[:PAGE])]


def test_an_unchanged_file_that_is_no_elf(loads: Callable[..., Loads], file: Path) -> None:
    file.write_bytes(page('x'))
    assert loads([backing(file), private(1)], []) == [(BASE, PAGE, b'')]


def test_changed_pages_lie_over_the_file(loads: Callable[..., Loads], file: Path) -> None:
    """A mapping of five pages from the second page of a file of four: zeros behind its end."""
    memory = [backing(file), private(5, PAGE), r.PageRuns(r.OF_MM, 1, (run(BASE + PAGE, 0), run(BASE + 4 * PAGE, 1)))]
    expected = page('y') + page('A') + b'tail'.ljust(PAGE, b'\0') + page('\0') + page('B')
    assert loads(memory, [page('A'), page('B')]) == [(BASE, 5 * PAGE, expected)]


def alone(start: int = BASE) -> Loads:
    return [(start, PAGE, b''), (start + PAGE, PAGE, page('A')), (start + 2 * PAGE, PAGE, b'')]


@pytest.mark.parametrize('changes', [{'size': 5}, {'mtime': 5}, {'inode': 5}, {'device': 5}, {'path': '/none/such'},
                                     {'path': ''}, {'path': 'relative'}, {'path': '/\0'}, {'path': '/'}])
def test_a_file_that_is_another_one(loads: Callable[..., Loads], file: Path, changes: dict[str, int | str]) -> None:
    memory = [backing(file, **changes), private(3), r.PageRuns(r.OF_MM, 1, (run(BASE + PAGE, 0),))]
    assert loads(memory, [page('A')]) == alone()


def test_no_link_on_the_path_is_followed(loads: Callable[..., Loads], file: Path) -> None:
    """Its owner has put links to a file of somebody else where the mapped one was."""
    (file.parent / 'link').symlink_to(file)
    (file.parent / 'dir').symlink_to(file.parent)
    for number, path in enumerate((file.parent / 'link', file.parent / 'dir' / 'file')):
        memory = [replace(backing(file), path=str(path)), private(3), r.PageRuns(r.OF_MM, 1, (run(BASE + PAGE, 0),))]
        home = file.parent / f'spool{number}'
        home.mkdir()
        assert loads_of(image_of(home, memory, [page('A')]), file.parent / 'core') == alone()


def test_a_fifo_in_place_of_the_file(loads: Callable[..., Loads], file: Path) -> None:
    record = backing(file)
    file.unlink()
    os.mkfifo(file)
    assert loads([record, private(3), r.PageRuns(r.OF_MM, 1, (run(BASE + PAGE, 0),))], [page('A')]) == alone()


def test_a_deleted_file_from_its_content(loads: Callable[..., Loads], file: Path) -> None:
    """Whole, whether shared or private, changed or not."""
    content = (r.Extent(0, PAGE, 2 * PAGE), r.Extent(0, 3 * PAGE, 3))
    memory = [backing(file, path='/gone', deleted=1, content=content),
              private(3), private(2, PAGE, BASE + 3 * PAGE),
              replace(private(4, 0, BASE + 5 * PAGE), kind=r.FILE_SHARED),
              private(1, 7 * PAGE, BASE + 9 * PAGE), r.PageRuns(r.OF_MM, 1, (run(BASE + PAGE, 0),))]
    first, end = b'\x7fELF'.ljust(PAGE, b'x'), b'end'.ljust(PAGE, b'\0')
    assert loads(memory, [page('A'), first + page('y'), b'end']) == [
        (BASE, 3 * PAGE, first + page('A') + end),
        (BASE + 3 * PAGE, 2 * PAGE, page('y') + end),
        (BASE + 5 * PAGE, 4 * PAGE, first + page('y') + end + page('\0')),
        (BASE + 9 * PAGE, PAGE, b'')]


# ---------------------------------------------------------------- processes

def test_threads_the_leader_first(spool: Path, tmp_path: Path) -> None:
    memory = [vma(BASE, 1), r.PageRuns(r.OF_MM, 1, (run(BASE, 0),))]
    image = image_of(spool, memory, [page('a')], task(7, stop_signal=19), task(8, parent=7))
    with ImageReader(image) as reader:
        assert export(reader, tmp_path) == ['core.7']
    with (tmp_path / 'core.7').open('rb') as file:
        notes = [note for segment in ELFFile(file).iter_segments('PT_NOTE') for note in segment.iter_notes()]
    assert [note['n_type'] for note in notes] == [
        'NT_PRSTATUS', 'NT_PRPSINFO', 'NT_AUXV', 'NT_FILE', 'NT_SIGINFO', 'NT_FPREGSET', 514,
        'NT_PRSTATUS', 'NT_FPREGSET', 514]
    status = [note['n_descdata'] for note in notes if note['n_type'] == 'NT_PRSTATUS']
    assert [struct.unpack_from('<i', one, 32)[0] for one in status] == [7, 8]
    assert [struct.unpack_from('<h', one, 12)[0] for one in status] == [19, 0]
    assert all(one[112:328] == bytes(range(216)) for one in status)


def test_a_dead_leader_with_living_threads(spool: Path, tmp_path: Path) -> None:
    image = image_of(spool, [vma(BASE, 1)], [], task(7, state=ord('Z'), mm_id=0), task(8, parent=7))
    with ImageReader(image) as reader:
        assert export(reader, tmp_path) == ['core.7']


def test_a_zombie_has_no_core(spool: Path, tmp_path: Path) -> None:
    image = image_of(spool, [], [], task(7, state=ord('Z'), mm_id=0))
    with ImageReader(image) as reader:
        assert export(reader, tmp_path) == []
        with pytest.raises(NoSuchTarget):
            plan_core(reader, 7)
        with pytest.raises(NoSuchTarget):
            plan_core(reader, 9)


def test_more_program_headers_than_a_header_counts(tmp_path: Path) -> None:
    count = PN_XNUM + 10
    headers = encode_headers(EM_X86_64, [Phdr(PT_LOAD, 4, 0, at * PAGE, 0, PAGE, PAGE) for at in range(count)])
    assert len(headers) == headers_size(count)
    (tmp_path / 'core').write_bytes(headers)
    said = subprocess.run(['readelf', '--wide', '--file-header', tmp_path / 'core'], capture_output=True, text=True,
                          check=True, env={**os.environ, 'LC_ALL': 'C'})
    assert said.stderr == ''
    assert f'65535 ({count})' in said.stdout
    with (tmp_path / 'core').open('rb') as file:
        elf = ELFFile(file)
        assert elf.num_segments() == count
        assert elf.get_segment(count - 1)['p_vaddr'] == (count - 1) * PAGE


def test_as_many_as_a_header_counts() -> None:
    headers = encode_headers(EM_X86_64, [Phdr(PT_LOAD, 4, 0, 0, 0, PAGE, PAGE)] * (PN_XNUM - 1))
    assert len(headers) == headers_size(PN_XNUM - 1) == 64 + 56 * (PN_XNUM - 1)


# ---------------------------------------------------------------- sinks

@pytest.fixture
def sparse(spool: Path) -> Path:
    """One process with three pages in a gigabyte."""
    runs = (run(BASE, 0), run(BASE + (512 << 20), 1), run(BASE + (512 << 20) + PAGE, 2))
    return image_of(spool, [vma(BASE, (1 << 30) // PAGE), r.PageRuns(r.OF_MM, 1, runs)],
                    [page('a'), page('b'), page('c')])


def is_the_sparse_core(path: Path) -> bool:
    at = path.stat()
    with path.open('rb') as file:
        [load] = ELFFile(file).iter_segments('PT_LOAD')
        file.seek(load['p_offset'] + (512 << 20))
        return (at.st_size == load['p_offset'] + (1 << 30) and at.st_blocks * 512 < 1 << 20
                and file.read(2 * PAGE) == page('b') + page('c'))


def test_a_core_file_has_holes(sparse: Path, tmp_path: Path) -> None:
    with ImageReader(sparse) as reader:
        assert export(reader, tmp_path) == ['core.7']
    assert is_the_sparse_core(tmp_path / 'core.7')
    assert (tmp_path / 'core.7').stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize('buffering', [-1, 0])
def test_a_tar_stream_through_a_pipe(sparse: Path, tmp_path: Path, buffering: int) -> None:
    theirs, ours = os.pipe()

    def write() -> None:
        with ImageReader(sparse) as reader, os.fdopen(ours, 'wb', buffering=buffering) as out:
            export(reader, out)

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(theirs, 'rb') as stream, tarfile.open(fileobj=stream, mode='r|') as tar:
        for member in tar:
            assert (member.name, member.mode, member.issparse()) == ('core.7', 0o600, True)
            tar.extract(member, tmp_path, filter='data')
    writer.join()
    assert is_the_sparse_core(tmp_path / 'core.7')


def test_gnu_tar_unpacks_it(sparse: Path, tmp_path: Path) -> None:
    with ImageReader(sparse) as reader, (tmp_path / 'cores.tar').open('wb') as out:
        export(reader, out)
    assert (tmp_path / 'cores.tar').stat().st_size < 1 << 16
    done = subprocess.run(['tar', '-xf', 'cores.tar'], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ''
    assert is_the_sparse_core(tmp_path / 'core.7')


def test_a_reader_that_goes_away(sparse: Path) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    with ImageReader(sparse) as reader, os.fdopen(ours, 'wb', buffering=0) as out, pytest.raises(CkptError) as caught:
        export(reader, out)
    assert 'Broken pipe' in caught.value.message


def test_an_old_core_is_not_overwritten(sparse: Path, tmp_path: Path) -> None:
    (tmp_path / 'core.7').write_text('old')
    with ImageReader(sparse) as reader, pytest.raises(CkptError, match='File exists'):
        export(reader, tmp_path)
    assert (tmp_path / 'core.7').read_text() == 'old'


def test_memory_of_an_export_is_bounded(spool: Path, tmp_path: Path) -> None:
    memory = [vma(BASE, 16 << 8), r.PageRuns(r.OF_MM, 1, (run(BASE, 0, 16 << 8),))]
    image = image_of(spool, memory, [bytes(16 << 20)])
    tracemalloc.start()
    with ImageReader(image) as reader, (tmp_path / 'core').open('wb') as out:
        write_core(reader, 7, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 << 20


# ---------------------------------------------------------------- hostile images

@pytest.mark.parametrize('memory', [
    [vma(BASE, 0)],
    [vma(0, 1 << 51), r.PageRuns(r.OF_MM, 1, (run(0, 0),))],
    [r.PageRuns(r.OF_MM, 1, (r.PageRun(BASE, 1, 9, 0),)), vma(BASE, 1)],
    [r.PageRuns(r.OF_MM, 1, (run(BASE, 50),)), vma(BASE, 1)],
    [r.PageRuns(r.OF_MM, 1, (r.PageRun(BASE, 1, 0, (1 << 64) - PAGE),)), vma(BASE, 1)],
    [vma(BASE, 1, kind=r.FILE_PRIVATE, object=3)],
], ids=['empty vma', 'all memory', 'no such part', 'behind the end', 'offset over 2**63', 'no backing'])
def test_records_that_cannot_be(spool: Path, memory: list[Record]) -> None:
    with ImageReader(image_of(spool, memory, [page('a')])) as reader, pytest.raises(ImageDamaged):
        write_core(reader, 7, io.BytesIO())


def test_runs_that_overlap_are_written_forward(loads: Callable[..., Loads]) -> None:
    runs = (run(BASE, 0, 3), run(BASE + PAGE, 0, 1), run(BASE + 2 * PAGE, 0, 2))
    memory = [vma(BASE, 4), r.PageRuns(r.OF_MM, 1, runs)]
    assert loads(memory, [page('a') + page('b') + page('c')]) == [
        (BASE, 4 * PAGE, page('a') + page('b') + page('c') + page('b'))]


def test_registers_of_another_size(spool: Path) -> None:
    parts = tree_records(task())
    parts['TASK'][1] = r.Registers(7, 62, bytes(10), b'')
    parts['MEM '] = [r.Mm(1, (0,) * 11, b'', 0, 1, 0)]
    with ImageReader(write_image(spool, parts, [])) as reader, pytest.raises(ImageDamaged, match='10 bytes, not 216'):
        plan_core(reader, 7)

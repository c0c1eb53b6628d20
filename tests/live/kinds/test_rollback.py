# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that went on living: put back from what was saved, cut back to what they were, or left alone if that fails."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.dump.save_files import SavedFiles
from ckptd.errors import CkptError
from ckptd.image.pages import DataWriter
from ckptd.image.records import Extent, SavedFile
from ckptd.kernel.copyrange import copy_range, copy_with_holes, zero_range
from ckptd.objects.files.base import OpenFile, read_open_file
from ckptd.objects.files.content import ContentSegment, dump_content
from tests.lib.brood import Brood, libc
from tests.live.kinds.conftest import Bulk, Restart, decoded, saved_of

Start = Callable[..., Restart]
MIB = 1 << 20
CLONE_NEWNS = 0x20000       # <linux/sched.h>
MS_REC, MS_PRIVATE = 16384, 1 << 18     # <linux/mount.h>


class Saving(Bulk):
    """A Content that saves every file that is open for writing."""

    def written(self, file: OpenFile) -> bool:
        return True

    def reads(self, file: OpenFile) -> bool:
        return True

    def save(self, file: OpenFile) -> tuple[ContentSegment, ...] | None:
        with file.reopen(os.O_RDONLY) as fd:
            return dump_content(fd, file.stat.st_size, self)


@pytest.fixture(params=['saved', 'not saved'])
def either(request: pytest.FixtureRequest) -> Bulk:
    return Saving() if request.param == 'saved' else Bulk()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / 'file'
    path.write_bytes(CONTENT)
    os.utime(path, ns=(0, 1_600_000_000_123_456_789))
    return path


CONTENT = b'start' * 1000 + b'end'


def save(path: Path, bulk: Bulk, flags: int = os.O_RDWR) -> SavedFile:
    """The record of the file as a process has it open that then ends."""
    with Brood() as own:
        return saved_of(read_open_file(*own.ask(lambda: os.open(path, flags))), bulk)


def rolled_back(job: Restart, saved: SavedFile) -> int:
    assert [row[:2] for row in job.obstacles(saved)] == [('warning', 'ESTALE')]
    return job.whole(saved)


def make(bulk: Bulk) -> Restart:
    return Restart(bulk, changed_files='rollback')


@pytest.fixture
def job_of() -> Iterator[Callable[[Bulk], Restart]]:
    made: list[Restart] = []

    def start(bulk: Bulk) -> Restart:
        made.append(make(bulk))
        return made[-1]
    yield start
    for one in made:
        one.close()


JobOf = Callable[[Bulk], Restart]


@pytest.mark.parametrize('flags', [os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_APPEND], ids=['both', 'write', 'append'])
def test_appended_is_cut_back(either: Bulk, job_of: JobOf, path: Path, flags: int) -> None:
    saved = save(path, either, flags)
    with path.open('ab') as file:
        file.write(b'more and more')
    rolled_back(job_of(either), saved)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert list(path.parent.iterdir()) == [path]


def overwrite(path: Path) -> None:
    with path.open('r+b') as file:
        file.seek(len(CONTENT) - 3)
        file.write(b'END and more')


def replace(path: Path) -> None:
    new = path.with_name('new')
    new.write_bytes(b'something else')
    new.rename(path)


def grow(path: Path) -> None:
    path.write_bytes(b'y' * 3 * MIB)


CHANGES = {'overwritten': overwrite, 'truncated': lambda path: os.truncate(path, 10), 'replaced': replace,
           'grown': grow, 'emptied': lambda path: os.truncate(path, 0)}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_saved_content_is_put_back(job_of: JobOf, path: Path, change: Callable[[Path], None]) -> None:
    bulk = Saving()
    saved = save(path, bulk, os.O_WRONLY | os.O_APPEND)
    change(path)
    inode = path.stat().st_ino
    rolled_back(job_of(bulk), saved)
    assert path.read_bytes() == CONTENT
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (1_600_000_000_123_456_789, inode)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_without_saved_content_it_is_refused(bulk: Bulk, job_of: JobOf, path: Path,
                                             change: Callable[[Path], None]) -> None:
    saved = save(path, bulk)
    change(path)
    rows = job_of(bulk).obstacles(saved)
    assert [row[:2] for row in rows] == [('refusal', 'ESTALE')]
    assert 'cannot be put back: its content was not saved' in rows[0][2]


def test_holes_come_back_as_holes(job_of: JobOf, path: Path) -> None:
    bulk = Saving()
    with path.open('r+b') as file:
        file.truncate(64 * MIB)
        file.seek(32 * MIB)
        file.write(b'middle')
    before = path.read_bytes()
    saved = save(path, bulk)
    with path.open('r+b') as file:
        file.write(b'x' * 40 * MIB)
    rolled_back(job_of(bulk), saved)
    assert path.read_bytes() == before
    assert path.stat().st_blocks * 512 < 2 * MIB


def test_several_descriptions_roll_back_once(job_of: JobOf, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk = Saving()
    files = [save(path, bulk, flags) for flags in (os.O_RDONLY, os.O_WRONLY)]
    overwrite(path)
    job, copies = job_of(bulk), []
    original = job.copy

    def copy(extent: Extent, fd: int, offset: int) -> None:
        copies.append(extent)
        original(extent, fd, offset)
    monkeypatch.setattr(job, 'copy', copy)
    fds = [job.restore(one) for one in files]
    for one, fd in zip(files, fds, strict=True):
        job.commit(one, fd)
    assert path.read_bytes() == CONTENT
    assert len(copies) == 1


def test_nothing_is_touched_unless_it_is_asked_for(restart: Start, path: Path) -> None:
    bulk = Saving()
    saved = save(path, bulk)
    overwrite(path)
    now = path.read_bytes()
    job = Restart(bulk, changed_files='accept')
    try:
        job.whole(saved)
    finally:
        job.close()
    assert path.read_bytes() == now


def test_file_open_for_reading_only_is_refused(bulk: Bulk, job_of: JobOf, path: Path) -> None:
    saved = save(path, bulk, os.O_RDONLY)
    with path.open('ab') as file:
        file.write(b'more')
    rows = job_of(bulk).obstacles(saved)
    assert [row[:2] for row in rows] == [('refusal', 'ESTALE')]
    assert 'did not have it open for writing' in rows[0][2]


def test_file_that_may_not_be_written_is_refused(job_of: JobOf, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk = Saving()
    saved = save(path, bulk, os.O_RDONLY)
    overwrite(path)
    job = job_of(bulk)
    monkeypatch.setattr(job, 'may', lambda path, access: access == os.R_OK)
    assert 'is not readable and writable' in job.obstacles(saved)[0][2]


@pytest.mark.parametrize('change', [overwrite, grow, lambda path: os.truncate(path, 10)])
def test_what_it_is_now_is_kept_first(job_of: JobOf, path: Path, monkeypatch: pytest.MonkeyPatch,
                                      change: Callable[[Path], None]) -> None:
    bulk = Saving()
    saved = save(path, bulk)
    change(path)
    now = path.read_bytes()
    job = job_of(bulk)
    fd = job.restore(saved)

    def full(extent: Extent, fd: int, offset: int) -> None:
        assert job.kept == [(str(path), now, 0)]
        raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(job, 'copy', full)
    with pytest.raises(CkptError, match=r'cannot roll back .*: Input/output error'):
        job.commit(saved, fd)


def test_of_an_appended_file_only_the_rest_is_kept(bulk: Bulk, job_of: JobOf, path: Path) -> None:
    saved = save(path, bulk)
    with path.open('ab') as file:
        file.write(b'more')
    job = job_of(bulk)
    rolled_back(job, saved)
    assert job.kept == [(str(path), b'more', len(CONTENT))]


def test_missing_file_is_made_again(job_of: JobOf, path: Path) -> None:
    bulk = Saving()
    files = [save(path, bulk, flags) for flags in (os.O_WRONLY, os.O_RDWR)]
    path.chmod(0o600)
    path.unlink()
    job = job_of(bulk)
    for one in files:
        assert job.obstacles(one) == [('warning', 'ENOENT', f'{path} is missing')]
    fds = [job.restore(one) for one in files]
    for one, fd in zip(files, fds, strict=True):
        job.commit(one, fd)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mtime_ns == 1_600_000_000_123_456_789
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.path.samestat(*map(os.fstat, fds))


def test_missing_file_that_cannot_be_made_again(bulk: Bulk, job_of: JobOf, path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    unsaved, saving = save(path, bulk), Saving()
    saved = save(path, saving)
    path.unlink()
    assert job_of(bulk).obstacles(unsaved) == [('refusal', 'ENOENT', f'{path} is missing')]
    job = job_of(saving)
    monkeypatch.setattr(job, 'may', lambda path, access: False)
    assert job.obstacles(saved) == [
        ('refusal', 'ENOENT', f'{path} is missing and cannot be made again in {path.parent}')]


def test_file_that_changes_further_is_not_cut(bulk: Bulk, job_of: JobOf, path: Path) -> None:
    saved = save(path, bulk)
    with path.open('ab') as file:
        file.write(b'more')
    job = job_of(bulk)
    fd = job.restore(saved)
    overwrite(path)
    with pytest.raises(CkptError, match='has changed further'):
        job.commit(saved, fd)
    replace(path)
    with pytest.raises(CkptError, match='was replaced'):
        job.commit(saved, fd)


@pytest.mark.needs('root')
def test_full_disk_is_found_before_anything_is_changed(brood: Brood, tmp_path: Path) -> None:
    """On a file system of 4 MiB: by the look that is taken first, and where that came too early."""
    def work() -> list[object]:
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(b'none', b'/', None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b'tmpfs', str(tmp_path).encode(), b'tmpfs', 0, b'size=4m') == 0
        bulk, path = Saving(), tmp_path / 'file'
        path.write_bytes(b'a' * 2 * MIB)
        fd = os.open(path, os.O_RDWR)
        saved = saved_of(read_open_file(os.getpid(), fd), bulk)
        os.close(fd)
        path.write_bytes(b'b' * MIB)
        room = os.statvfs(tmp_path)
        (tmp_path / 'ballast').write_bytes(bytes(room.f_bavail * room.f_frsize - 65536))
        now, job = path.read_bytes(), make(bulk)
        rows, said = job.obstacles(saved), ''
        try:
            job.whole(saved)
        except CkptError as error:
            said = f'{error.errno} {error}'
        job.close()
        return [rows[0][2], said, path.read_bytes()[:MIB] == now, sorted(path.name for path in tmp_path.iterdir())]
    looked, said, same, names = brood.ask(work)[1]
    assert 'cannot be put back: its file system lacks 983,040 bytes for that' in str(looked)
    assert str(said).startswith(f'{errno.ENOSPC} ')
    assert (same, names) == (True, ['ballast', 'file'])


# ---------------------------------------------------------------- the dump side

@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataWriter]:
    directory = tmp_path / 'image'
    directory.mkdir()
    writer = DataWriter(directory, 0)
    yield writer
    writer.close()


def read(data: DataWriter, size: int, segments: tuple[ContentSegment, ...]) -> bytes:
    content = bytearray(size)
    for start, extent in ((segment.start, segment.extent) for segment in segments):
        content[start:start + extent.length] = os.pread(data.fileno(), extent.length, extent.offset)
    return bytes(content)


def test_files_are_saved_once_and_within_the_limit(brood: Brood, data: DataWriter, path: Path) -> None:
    large = path.with_name('large')
    large.write_bytes(b'x' * MIB)
    os.truncate(large, 8 * MIB)

    def work() -> list[int]:
        return [os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY), os.open(large, os.O_WRONLY)]
    pid, fds = brood.ask(work)
    writer, reader, too_large = (read_open_file(pid, fd) for fd in fds)
    saved = SavedFiles(data, MIB)
    assert not saved.written(reader)
    for file in (writer, reader, too_large):
        saved.enter(file)
    assert saved.written(reader)
    segments = saved.save(writer)
    assert segments is not None
    assert read(data, len(CONTENT), segments) == CONTENT
    assert saved.save(reader) is segments
    assert saved.save(too_large) is None
    assert [(one.file.path, one.errno) for one in saved.unsaved] == [(str(large), 'EFBIG')]
    larger = SavedFiles(data, 2 * MIB)
    segments = larger.save(too_large)
    assert segments is not None
    assert read(data, 8 * MIB, segments) == large.read_bytes()
    assert data.size < 3 * MIB


def test_reading_leaves_the_time_of_access(brood: Brood, bulk: Bulk, path: Path) -> None:
    os.utime(path, ns=(10**9, 2 * 10**9))       # relatime: a read would set it
    saved = saved_of(read_open_file(*brood.ask(lambda: os.open(path, os.O_RDWR))), bulk)
    assert decoded(saved).tail
    assert path.stat().st_atime_ns == 10**9


def test_nothing_is_saved_unless_it_is_asked_for(brood: Brood, data: DataWriter, path: Path) -> None:
    file = read_open_file(*brood.ask(lambda: os.open(path, os.O_RDWR)))
    saved = SavedFiles(data, 0)
    assert (saved.save(file), saved.unsaved, data.size) == (None, [], 0)


def test_record_without_what_came_later(bulk: Bulk, path: Path) -> None:
    """An image of a ckptd that saved nothing."""
    saved = save(path, bulk, os.O_RDONLY)
    record = decoded(saved)
    assert (record.is_saved, record.saved, record.tail) == (0, (), b'')
    older = type(record).decode(saved.data[:-13])
    assert older == record


def test_copies_by_the_kernel(tmp_path: Path) -> None:
    one, other = tmp_path / 'one', Path(f'/dev/shm/ckptd-test-{os.getpid()}')
    one.write_bytes(b'x' * 5000)
    try:
        with one.open('rb') as source, other.open('w+b') as target:
            assert copy_range(source.fileno(), 1000, 9000, target.fileno(), 8192) == 4000
            assert other.read_bytes() == bytes(8192) + b'x' * 4000
            zero_range(target.fileno(), 9000, 9010)
            assert other.read_bytes() == bytes(8192) + b'x' * 808 + bytes(10) + b'x' * 3182
    finally:
        other.unlink()


@pytest.mark.parametrize('size', [0, 6 * MIB, 20 * MIB], ids=['new', 'shorter', 'longer'])
def test_copies_with_holes(tmp_path: Path, size: int) -> None:
    one, other = tmp_path / 'one', tmp_path / 'other'
    with one.open('w+b') as source, other.open('w+b') as target:
        os.pwrite(source.fileno(), b'a' * 5000, MIB)
        os.pwrite(source.fileno(), b'b' * MIB, 4 * MIB)
        os.ftruncate(source.fileno(), 9 * MIB)
        os.pwrite(target.fileno(), b'z' * size, 0)
        assert copy_with_holes(source.fileno(), 4096, 9 * MIB, target.fileno(), 8192) == 9 * MIB - 4096
        os.ftruncate(target.fileno(), 9 * MIB + 4096)
        expected, found = one.read_bytes()[4096:], other.read_bytes()
        assert found == b'z' * min(size, 8192) + bytes(8192 - min(size, 8192)) + expected
        assert other.stat().st_blocks * 512 < 2 * MIB

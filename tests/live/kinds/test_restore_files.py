# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files, directories, memfds, devices, terminals opened again, and what is in the way of it."""

import fcntl
import os
import pty
import stat
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.errors import CkptError, NotSupported
from ckptd.image.records import Extent, SavedFile
from ckptd.objects.files.base import OpenFile, read_open_file
from ckptd.objects.files.deleted import deleted_file, whole
from ckptd.objects.files.registry import Kinds
from tests.lib.brood import Brood
from tests.live.kinds.conftest import BY_TAG, Bulk, Restart, decoded, saved_of

Start = Callable[..., Restart]
Opened = Callable[[Callable[[], int]], OpenFile]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved(opened: Opened, bulk: Bulk) -> Callable[[Callable[[], int]], SavedFile]:
    return lambda work: saved_of(opened(work), bulk)


Saved = Callable[[Callable[[], int]], SavedFile]


def flags_of(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


# ---------------------------------------------------------------- named files

FLAGS = {'read': os.O_RDONLY, 'write': os.O_WRONLY, 'append': os.O_RDWR | os.O_APPEND,
         'sync': os.O_WRONLY | os.O_SYNC, 'nonblocking': os.O_RDONLY | os.O_NONBLOCK,
         'no links': os.O_RDWR | os.O_NOFOLLOW, 'no access times': os.O_RDONLY | os.O_NOATIME}


@pytest.mark.parametrize('flags', FLAGS.values(), ids=FLAGS)
def test_named_file(saved: Saved, restart: Start, tmp_path: Path, flags: int) -> None:
    (tmp_path / 'file').write_bytes(b'hello')
    one = saved(lambda: os.open('file', flags))
    job = restart()
    assert job.obstacles(one) == []
    fd = job.whole(one)
    assert os.path.samestat(os.fstat(fd), (tmp_path / 'file').stat())
    assert flags_of(fd) == one.flags
    assert flags_of(fd) & os.O_ACCMODE == flags & os.O_ACCMODE


def test_file_of_proc(saved: Saved, restart: Start) -> None:
    one = saved(lambda: os.open('/proc/meminfo', os.O_RDONLY))
    job = restart()
    assert job.obstacles(one) == []
    assert b'MemTotal' in os.read(job.whole(one), 100)
    assert not BY_TAG[one.kind].late(decoded(one), one)


def test_file_of_a_process_is_opened_late(saved: Saved, restart: Start) -> None:
    one = saved(lambda: os.open('/proc/self/status', os.O_RDONLY))
    assert restart().obstacles(one) == []       # who knows whether that process is yet to be made
    assert BY_TAG[one.kind].late(decoded(one), one)


def test_directory_of_a_process_is_opened_late(saved: Saved, restart: Start) -> None:
    one = saved(lambda: os.open('/proc/self/task', os.O_RDONLY))
    assert restart().obstacles(one) == []
    assert BY_TAG[one.kind].late(decoded(one), one)


def make_file() -> int:
    fd = os.open('file', os.O_RDWR | os.O_CREAT)
    os.write(fd, b'hello')
    return fd


def replace() -> None:
    Path('new').write_bytes(b'hello')
    Path('new').rename('file')


def append(path: str, data: bytes) -> None:
    with Path(path).open('ab') as file:
        file.write(data)


def set_back(path: str) -> None:
    os.utime(path, ns=(0, 1_000_000_000))


CHANGES = {
    'longer': (lambda: append('file', b' there'), 'has 11 bytes, not 5'),
    'shorter': (lambda: os.truncate('file', 1), 'has 1 bytes, not 5'),
    'written': (lambda: set_back('file'), 'was written at'),
    'replaced': (replace, 'is another file (inode'),
}


@pytest.mark.parametrize(('change', 'words'), CHANGES.values(), ids=CHANGES)
def test_changed_file(saved: Saved, restart: Start, change: Callable[[], object], words: str) -> None:
    one = saved(make_file)
    change()
    refused = restart().obstacles(one)
    assert [row[:2] for row in refused] == [('refusal', 'ESTALE')]
    assert words in refused[0][2]
    accepted = restart(changed_files='accept')
    assert [row[:2] for row in accepted.obstacles(one)] == [('warning', 'ESTALE')]
    accepted.whole(one)
    with pytest.raises(CkptError, match='file'):        # changed after it was looked at
        restart().restore(one)


@pytest.mark.parametrize('changed_files', ['refuse', 'accept', 'rollback'])     # rollback: nothing was saved
def test_missing_file(saved: Saved, restart: Start, tmp_path: Path, changed_files: str) -> None:
    one = saved(make_file)
    Path('file').unlink()
    assert restart(changed_files=changed_files).obstacles(one) == [
        ('refusal', 'ENOENT', f'{tmp_path}/file is missing')]


@pytest.mark.parametrize('changed_files', ['refuse', 'accept', 'rollback'])
def test_file_that_is_none_any_more(saved: Saved, restart: Start, tmp_path: Path, changed_files: str) -> None:
    one = saved(make_file)
    Path('file').unlink()
    Path('file').mkdir()
    assert restart(changed_files=changed_files).obstacles(one) == [
        ('refusal', 'ESTALE', f'{tmp_path}/file is no longer a regular file')]


def test_file_without_the_right(saved: Saved, restart: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = saved(make_file)
    job = restart()
    monkeypatch.setattr(job, 'may', lambda path, access: access == os.R_OK)
    assert job.obstacles(one) == [('refusal', 'EACCES', f'{tmp_path}/file cannot be read and written')]


# ---------------------------------------------------------------- deleted files

def sparse() -> int:
    fd = os.open('gone', os.O_RDWR | os.O_CREAT, 0o640)
    os.pwrite(fd, b'first', 0)
    os.pwrite(fd, b'last', 8 * MIB)
    os.ftruncate(fd, 16 * MIB + 5)
    Path('gone').unlink()
    return fd


@pytest.mark.parametrize('taken', [False, True], ids=['name free', 'name taken'])
def test_deleted_file(saved: Saved, restart: Start, tmp_path: Path, taken: bool) -> None:
    one = saved(sparse)
    if taken:
        (tmp_path / 'gone').write_text('another')
    job = restart()
    assert job.obstacles(one) == []
    fd = job.whole(one)
    job.close_shared()
    of, record = os.fstat(fd), decoded(one)
    assert (of.st_nlink, of.st_size, stat.S_IMODE(of.st_mode)) == (0, 16 * MIB + 5, stat.S_IMODE(record.mode))
    assert of.st_mtime_ns == record.mtime
    assert of.st_blocks * 512 < MIB
    assert os.pread(fd, 20 * MIB, 0) == b'first' + bytes(8 * MIB - 5) + b'last' + bytes(8 * MIB + 1)
    assert list(tmp_path.iterdir()) == ([tmp_path / 'gone'] if taken else [])
    if not taken:
        assert os.readlink(f'/proc/self/fd/{fd}') == f'{tmp_path}/gone (deleted)'  # noqa: PTH115


def test_descriptions_and_mappings_share_a_deleted_file(brood: Brood, bulk: Bulk, restart: Start) -> None:
    def work() -> list[int]:
        fd = os.open('gone', os.O_WRONLY | os.O_CREAT, 0o400)
        os.write(fd, b'content')
        return [fd, os.open('gone', os.O_RDONLY), Path('gone').unlink() or 0]
    pid, (write, read, _) = brood.ask(work)
    files = [saved_of(read_open_file(pid, fd), bulk, fd) for fd in (write, read)]
    job = restart()
    writer, reader = map(job.whole, files)
    record = decoded(files[0])
    base = deleted_file(record.path, record.device, record.inode, record.size, record.mode, (), job)
    os.pwrite(writer, b'C', 0)
    assert os.read(reader, 100) == os.pread(base, 100, 0) == b'Content'
    assert stat.S_IMODE(os.fstat(reader).st_mode) == 0o400


def test_content_of_a_deleted_mapped_file(bulk: Bulk, restart: Start, tmp_path: Path) -> None:
    """As the engine has it from a Backing record."""
    extents = (bulk.add([b'a' * 4096]), bulk.add([b'end']))
    job = restart()
    base = deleted_file(f'{tmp_path}/gone', 1, 2, 4099, 0o600, whole(extents), job)
    assert os.pread(base, 9999, 0) == b'a' * 4096 + b'end'
    assert deleted_file(f'{tmp_path}/gone', 1, 2, 0, 0o600, (), job) == base


def test_nameless_file(saved: Saved, restart: Start) -> None:
    def work() -> int:
        fd = os.open('.', os.O_RDWR | os.O_TMPFILE)
        os.write(fd, b'temporary')
        return fd
    job = restart()
    assert os.pread(job.whole(saved(work)), 100, 0) == b'temporary'


def test_deleted_file_whose_directory_is_gone(saved: Saved, restart: Start, tmp_path: Path) -> None:
    def work() -> int:
        Path('directory').mkdir()
        fd = os.open('directory/gone', os.O_RDWR | os.O_CREAT)
        os.write(fd, b'x')
        Path('directory/gone').unlink()
        Path('directory').rmdir()
        return fd
    one = saved(work)
    job = restart()
    assert [row[:2] for row in job.obstacles(one)] == [('warning', 'ENOENT')]
    assert os.pread(job.whole(one), 9, 0) == b'x'
    assert list(tmp_path.iterdir()) == []


def test_deleted_file_that_has_no_place(saved: Saved, restart: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    one = saved(sparse)
    job = restart()
    monkeypatch.setattr(job, 'may', lambda path, access: False)
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'EACCES')]
    with pytest.raises(CkptError, match='cannot be made again'):
        job.restore(one)


def test_nothing_is_left_where_the_content_fails(saved: Saved, restart: Start, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def full(extent: Extent, fd: int, offset: int) -> None:
        raise OSError(28, 'No space left on device')
    one = saved(sparse)
    job = restart()
    monkeypatch.setattr(job, 'copy', full)
    with pytest.raises(OSError, match='space'):
        job.restore(one)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- directories, devices, memfds, terminals

def open_directory() -> int:
    Path('directory').mkdir()
    return os.open('directory', os.O_RDONLY | os.O_DIRECTORY)


def test_directory(saved: Saved, restart: Start, tmp_path: Path) -> None:
    one = saved(open_directory)
    job = restart()
    assert job.obstacles(one) == []
    fd = job.whole(one)
    assert os.path.samestat(os.fstat(fd), (tmp_path / 'directory').stat())
    assert flags_of(fd) == one.flags


def test_restore_checks_of_a_directory(saved: Saved, restart: Start, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    one = saved(open_directory)
    job = restart()
    Path('directory').rename('kept')
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'ENOENT')]
    Path('directory').write_text('')
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'ENOTDIR')]
    with pytest.raises(OSError, match='Not a directory'):
        job.restore(one)
    Path('directory').unlink()
    Path('directory').mkdir()
    assert [row[:2] for row in job.obstacles(one)] == [('warning', 'ESTALE')]
    monkeypatch.setattr(job, 'may', lambda path, access: False)
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'EACCES')]


def test_device(saved: Saved, restart: Start) -> None:
    one = saved(lambda: os.open('/dev/full', os.O_RDWR | os.O_NONBLOCK))
    job = restart()
    assert job.obstacles(one) == []
    fd = job.whole(one)
    assert (os.fstat(fd).st_rdev, flags_of(fd)) == (os.makedev(1, 7), one.flags)


def test_restore_checks_of_a_device(saved: Saved, restart: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    one = saved(lambda: os.open('/dev/full', os.O_RDWR))
    job = restart()
    monkeypatch.setattr(job, 'may', lambda path, access: False)
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'EACCES')]
    monkeypatch.setattr(job, 'lstat', lambda path: Path('/dev/null').stat())
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'ENODEV')]
    monkeypatch.setattr(job, 'lstat', lambda path: None)
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'ENOENT')]
    monkeypatch.setattr(job, 'open', lambda path, flags: os.open('/dev/null', flags))
    with pytest.raises(CkptError, match='no longer the device 1:7'):
        job.restore(one)


def make_memfd() -> int:
    fd = os.memfd_create('na me', os.MFD_ALLOW_SEALING)
    os.pwrite(fd, b'data', 2 * MIB)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    return fd


def test_memfd_with_its_content(saved: Saved, restart: Start) -> None:
    one = saved(make_memfd)
    job = restart()
    first, second = job.restore(one), job.restore(one)
    job.finish(one, first)
    job.finish(one, second)
    assert os.path.samestat(os.fstat(first), os.fstat(second))
    assert fcntl.fcntl(first, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
    assert os.pread(first, 3 * MIB, 0) == bytes(2 * MIB) + b'data'
    assert os.readlink(f'/proc/self/fd/{first}') == '/memfd:na me (deleted)'  # noqa: PTH115


def test_memfd_of_shared_memory(opened: Opened, restart: Start) -> None:
    class Sharing(Bulk):
        def shared_memory(self, file: OpenFile) -> int:
            return 7
    one = saved_of(opened(make_memfd), Sharing())
    job = restart()
    job.shared[7] = os.memfd_create('x')
    try:
        fd = job.whole(one)
        assert os.path.samestat(os.fstat(fd), os.fstat(job.shared[7]))
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL       # of the engine
    finally:
        os.close(job.shared[7])


@pytest.fixture
def terminal() -> Iterator[int]:
    master, slave = pty.openpty()
    yield slave
    os.close(master)
    os.close(slave)


def test_terminal_of_the_caller(saved: Saved, restart: Start, terminal: int) -> None:
    one = saved(lambda: pty.openpty()[1])
    job = restart(terminal_fd=terminal)
    assert job.obstacles(one) == []
    fd = job.whole(one)
    assert (os.fstat(fd).st_rdev, flags_of(fd) & os.O_ACCMODE) == (os.fstat(terminal).st_rdev, os.O_RDWR)


def test_terminal_that_is_still_there(saved: Saved, restart: Start, terminal: int,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    one = saved(lambda: os.open(os.ttyname(terminal), os.O_RDWR | os.O_NOCTTY))
    job = restart()
    assert [row[:2] for row in job.obstacles(one)] == [('warning', 'ENOTTY')]
    fd = job.whole(one)
    assert (os.fstat(fd).st_rdev, flags_of(fd)) == (os.fstat(terminal).st_rdev, one.flags)
    monkeypatch.setattr(job, 'may', lambda path, access: False)
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'EACCES')]


def test_terminal_that_is_gone(saved: Saved, restart: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    one = saved(lambda: pty.openpty()[1])
    job = restart()
    monkeypatch.setattr(job, 'lstat', lambda path: None)
    assert [row[:2] for row in job.obstacles(one)] == [('refusal', 'ENOTTY')]


def test_terminal_that_is_detached(saved: Saved, restart: Start, terminal: int) -> None:
    """It is hung up, whatever else could take its place."""
    one = saved(lambda: os.open(os.ttyname(terminal), os.O_RDWR | os.O_NOCTTY))
    job = restart(detach_terminal=True, terminal_fd=terminal)
    assert [row[:2] for row in job.obstacles(one)] == [('warning', 'ENOTTY')]
    fd = job.whole(one)
    assert os.read(fd, 1) == b''
    with pytest.raises(OSError, match='Input/output error'):
        os.write(fd, b'x')


@pytest.mark.needs('root')
@pytest.mark.parametrize('path', ['/dev/tty63', '/dev/ttyS0'])
def test_console_and_serial_line(saved: Saved, restart: Start, terminal: int, path: str) -> None:
    """They are opened again by their names, with the settings that they had, also beside a terminal of the caller."""
    try:
        line = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        pytest.skip(f'{path} cannot be opened here: {error.strerror}')
    before = termios.tcgetattr(line)
    try:
        other = [*before[:3], before[3] ^ termios.ECHO, *before[4:]]
        termios.tcsetattr(line, termios.TCSANOW, other)
        one = saved(lambda: os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
        termios.tcsetattr(line, termios.TCSANOW, before)
        job = restart(terminal_fd=terminal)
        assert [row[:2] for row in job.obstacles(one)] == [('warning', 'ENOTTY')]
        fd = job.whole(one)
        assert os.fstat(fd).st_rdev == os.stat(path).st_rdev  # noqa: PTH116
        assert termios.tcgetattr(line) == other
        assert flags_of(fd) == one.flags
    finally:
        termios.tcsetattr(line, termios.TCSANOW, before)
        os.close(line)


# ---------------------------------------------------------------- what all have

def test_every_kind_can_be_restored() -> None:
    assert all('create' in vars(type(kind)) for kind in BY_TAG.values())


def test_kind_of_a_newer_ckptd(restart: Start) -> None:
    one = SavedFile(1, 'socket', 0, 0, 0, 0, 0, 0, 'socket:[1]', b'')
    with pytest.raises(NotSupported, match=r"socket:\[1\]: no file of kind 'socket'"):
        Kinds().unsupported.create(Kinds().unsupported.record(), one, restart())

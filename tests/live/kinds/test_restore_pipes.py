# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pipes and FIFOs made again: one pipe for all its ends, with what was in it, and ended where it was ended."""

import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import Busy, CkptError
from ckptd.image.records import SavedFile
from ckptd.kernel.namei import AT_FDCWD
from ckptd.objects.files.base import read_open_file
from tests.live.kinds.conftest import Bulk, Restart, saved_of

Start = Callable[..., Restart]


def save(fd: int, bulk: Bulk, file_id: int = 1) -> SavedFile:
    return saved_of(read_open_file(os.getpid(), fd), bulk, file_id)


def save_all(fds: tuple[int, ...], bulk: Bulk) -> list[SavedFile]:
    """Records of open fds, which are closed."""
    saved = [save(fd, bulk, number) for number, fd in enumerate(fds, 1)]
    for fd in fds:
        os.close(fd)
    return saved


def bring_back(job: Restart, saved: list[SavedFile]) -> list[int]:
    fds = [job.restore(one) for one in saved]
    for one, fd in zip(saved, fds, strict=True):
        job.finish(one, fd)
    job.close_shared()
    return fds


@pytest.mark.parametrize('order', [1, -1], ids=['reader first', 'writer first'])
@pytest.mark.parametrize('data', [b'', b'x', b'hello' * 100, os.urandom(65536)], ids=['empty', 'one', 'some', 'full'])
def test_both_ends_are_of_one_pipe(bulk: Bulk, restart: Start, data: bytes, order: int) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    os.write(write, data)
    fds = bring_back(restart(), save_all((read, write), bulk)[::order])[::order]
    assert [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in fds] == [os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK]
    assert (os.read(fds[0], 1 << 20) if data else b'') == data
    with pytest.raises(BlockingIOError):
        os.read(fds[0], 1)
    os.write(fds[1], b'more')
    assert os.read(fds[0], 100) == b'more'


def test_ends_are_ended_where_the_others_were_outside(bulk: Bulk, restart: Start) -> None:
    (readable, write), (read, writable) = os.pipe(), os.pipe()
    os.write(write, b'last words')
    reader, writer = save(readable, bulk, 1), save(writable, bulk, 2)
    for fd in (readable, write, read, writable):
        os.close(fd)
    fds = bring_back(restart(), [reader, writer])
    assert [os.read(fds[0], 100) for _ in range(2)] == [b'last words', b'']
    with pytest.raises(BrokenPipeError):
        os.write(fds[1], b'x')


PACKETS = {'three': (b'one', b'three', b'x' * 4096), 'one': (b'single',)}


@pytest.mark.parametrize('packets', PACKETS.values(), ids=PACKETS)
@pytest.mark.parametrize('order', [1, -1], ids=['reader first', 'writer first'])
def test_packets_stay_packets(bulk: Bulk, restart: Start, packets: tuple[bytes, ...], order: int) -> None:
    read, write = os.pipe2(os.O_DIRECT)
    for packet in packets:
        os.write(write, packet)
    fds = bring_back(restart(), save_all((read, write), bulk)[::order])[::order]
    # of a packet, what does not fit into the buffer is lost: a stream would give it to the next read
    assert [os.read(fds[0], 2) for _ in packets] == [packet[:2] for packet in packets]
    os.write(fds[1], b'aa')
    os.write(fds[1], b'b')
    assert [os.read(fds[0], 100) for _ in range(2)] == [b'aa', b'b']


def test_stream_stays_a_stream(bulk: Bulk, restart: Start) -> None:
    read, write = os.pipe()
    os.write(write, b'abcdef')
    fds = bring_back(restart(), save_all((read, write), bulk))
    assert [os.read(fds[0], 3) for _ in range(2)] == [b'abc', b'def']


def test_content_comes_once_for_several_readers(bulk: Bulk, restart: Start) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    again = os.open(f'/proc/self/fd/{read}', os.O_RDWR | os.O_NONBLOCK)
    os.write(write, b'once')
    fds = bring_back(restart(), save_all((read, again, write), bulk))
    assert os.read(fds[0], 100) == b'once'
    with pytest.raises(BlockingIOError):
        os.read(fds[1], 100)


def test_capacity_and_owner(bulk: Bulk, restart: Start) -> None:
    read, write = os.pipe()
    size = fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.fchmod(read, 0o640)
    data = os.urandom(size)
    os.write(write, data)
    fds = bring_back(restart(), save_all((read, write), bulk))
    assert fcntl.fcntl(fds[0], fcntl.F_GETPIPE_SZ) == size
    assert stat.S_IMODE(os.fstat(fds[0]).st_mode) == 0o640
    assert os.read(fds[0], size) == data


@pytest.mark.needs('root')
def test_pipe_of_another_user(bulk: Bulk, restart: Start) -> None:
    read, write = os.pipe()
    os.fchown(read, 1234, 4321)
    fds = bring_back(restart(), save_all((read, write), bulk))
    assert (os.fstat(fds[1]).st_uid, os.fstat(fds[1]).st_gid) == (1234, 4321)


def test_image_that_lies_about_lengths(bulk: Bulk, restart: Start) -> None:
    read, write = os.pipe()
    os.write(write, b'hello')
    saved = save_all((read, write), bulk)
    bulk.stretches[0] = b'hello'
    job = restart()
    fd = job.restore(saved[0])
    data = bytearray(saved[0].data)
    assert data[-4:] == (5).to_bytes(4, 'little')
    data[-4:] = (6).to_bytes(4, 'little')
    lying = SavedFile(**{name: getattr(saved[0], name) for name in SavedFile.__slots__} | {'data': bytes(data)})
    with pytest.raises(CkptError, match='differs from that of its packets'):
        job.finish(lying, fd)


def test_image_that_has_more_than_fits(bulk: Bulk, restart: Start) -> None:
    read, write = os.pipe()
    os.write(write, b'x' * 8192)
    saved = save_all((read, write), bulk)[0]
    job = restart()
    fd = job.restore(saved)
    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4096)
    with pytest.raises(CkptError, match='cannot contain 8,192'):
        job.finish(saved, fd)


# ---------------------------------------------------------------- FIFOs

@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / 'fifo'
    os.mkfifo(path, 0o600)
    return path


def ends_of(fifo: Path) -> tuple[int, int]:
    read = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    write = os.open(fifo, os.O_WRONLY)
    os.write(write, b'in the queue')
    return read, write


def test_fifo(bulk: Bulk, restart: Start, fifo: Path) -> None:
    saved = save_all(ends_of(fifo), bulk)
    job = restart()
    assert job.obstacles(saved[0]) == []
    fds = bring_back(job, saved)
    assert os.path.samestat(os.fstat(fds[0]), fifo.stat())
    assert os.read(fds[0], 100) == b'in the queue'
    job.let_go(fds[1])
    assert os.read(fds[0], 100) == b''


@pytest.mark.parametrize('taken', [False, True], ids=['name free', 'name taken'])
def test_deleted_fifo_is_made_again(bulk: Bulk, restart: Start, fifo: Path, taken: bool) -> None:
    fds = ends_of(fifo)
    fifo.unlink()
    saved = save_all(fds, bulk)
    if taken:
        fifo.write_text('another')
    job = restart()
    assert job.obstacles(saved[0]) == []
    fds = tuple(bring_back(job, saved))
    assert os.read(fds[0], 100) == b'in the queue'
    assert os.path.samestat(os.fstat(fds[0]), os.fstat(fds[1]))
    assert os.fstat(fds[0]).st_nlink == 0
    assert list(fifo.parent.iterdir()) == ([fifo] if taken else [])


def exchange(name: str, home: int, other: Path) -> None:
    """The FIFO goes where `other` was, which gets its name."""
    aside = other.with_name('aside')
    os.rename(name, aside, src_dir_fd=home)
    os.rename(other, name, dst_dir_fd=home)
    aside.rename(other)


def put_link(name: str, home: int, other: Path) -> None:
    os.unlink(name, dir_fd=home)
    os.symlink(other, name, dir_fd=home)


def link(name: str, home: int, other: Path) -> None:
    other.unlink()
    os.link(name, other, src_dir_fd=home)


@pytest.mark.parametrize('act', [exchange, put_link, link], ids=['exchanged', 'replaced by a link', 'linked'])
def test_deleted_fifo_whose_name_is_somebody_elses_for_a_moment(
        bulk: Bulk, restart: Start, fifo: Path, monkeypatch: pytest.MonkeyPatch,
        act: Callable[[str, int, Path], None]) -> None:
    """Between mkfifo(2) and open(2): nothing that has a name gets the owner and mode of the image."""
    read, write = ends_of(fifo)
    os.fchmod(read, 0o6755)
    fifo.unlink()
    saved = save_all((read, write), bulk)
    other, kept = fifo.with_name('other'), fifo.with_name('kept')
    other.write_text('a program')
    other.chmod(0o700)
    os.link(other, kept)
    mkfifo = os.mkfifo

    def make(path: str, mode: int = 0o666, *, dir_fd: int = AT_FDCWD) -> None:
        mkfifo(path, mode, dir_fd=dir_fd)
        act(path, dir_fd, other)
    monkeypatch.setattr(os, 'mkfifo', make)
    with pytest.raises((CkptError, OSError), match=r'was replaced|symbolic links'):
        restart().restore(saved[0])
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert kept.read_text() == 'a program'
    assert not [path for path in fifo.parent.iterdir() if stat.S_IMODE(path.lstat().st_mode) & 0o6000]


@pytest.mark.needs('root')
def test_deleted_fifo_that_another_user_puts_in_its_place(bulk: Bulk, restart: Start, fifo: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Who would read what the tree writes."""
    fds = ends_of(fifo)
    fifo.unlink()
    saved = save_all(fds, bulk)
    mkfifo = os.mkfifo

    def make(path: str, mode: int = 0o666, *, dir_fd: int = AT_FDCWD) -> None:
        mkfifo(path, mode, dir_fd=dir_fd)
        os.chown(path, 1234, 1234, dir_fd=dir_fd)
    monkeypatch.setattr(os, 'mkfifo', make)
    with pytest.raises(CkptError, match='was replaced'):
        restart().restore(saved[0])
    assert list(fifo.parent.iterdir()) == []


def test_fifo_that_is_in_use(bulk: Bulk, restart: Start, fifo: Path) -> None:
    saved = save_all(ends_of(fifo), bulk)
    others = ends_of(fifo)
    try:
        with pytest.raises(Busy, match='another program'):
            restart().restore(saved[0])
        assert os.read(others[0], 100) == b'in the queue'
    finally:
        for fd in others:
            os.close(fd)


def test_fifo_in_which_others_wrote_meanwhile(bulk: Bulk, restart: Start, fifo: Path) -> None:
    read, write = ends_of(fifo)
    os.read(read, 100)
    saved = save_all((read, write), bulk)
    others = ends_of(fifo)
    try:
        fds = bring_back(restart(), saved)
        assert os.read(fds[0], 100) == b'in the queue'
    finally:
        for fd in others:
            os.close(fd)


def test_restore_checks_of_a_fifo(bulk: Bulk, restart: Start, fifo: Path) -> None:
    saved = save_all(ends_of(fifo), bulk)[0]
    fifo.unlink()
    assert restart().obstacles(saved) == [('refusal', 'ENOENT', f'{fifo} is missing')]
    fifo.write_text('')
    assert restart().obstacles(saved) == [('refusal', 'ESTALE', f'{fifo} is no longer a FIFO')]
    with pytest.raises(CkptError, match='no longer a FIFO'):
        restart().restore(saved)


def test_fifo_without_the_right(bulk: Bulk, restart: Start, fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_all(ends_of(fifo), bulk)[0]
    job = restart()
    monkeypatch.setattr(job, 'may', lambda path, access: access == os.R_OK)
    assert [row[:2] for row in job.obstacles(saved)] == [('refusal', 'EACCES')]

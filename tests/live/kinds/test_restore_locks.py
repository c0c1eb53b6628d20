# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locks taken again: another process finds them taken, and one that somebody else has now is an error that says so."""

import errno
import fcntl
import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import Busy, CkptError, NotSupported
from ckptd.image.records import SavedFile
from ckptd.objects.files.base import read_open_file
from ckptd.objects.files.locks import F_OFD_GETLK, F_OFD_SETLK
from tests.lib import settled
from tests.lib.brood import Brood
from tests.live.kinds.conftest import Bulk, Restart, saved_of

Start = Callable[..., Restart]
FLOCK = 'hhqqi4x'


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('file').write_bytes(b'x' * 1000)


def posix(fd: int) -> None:
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 100)
    fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 0, 500)


def ofd(fd: int) -> None:
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 3, 4, 0))


def flock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lease(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)


LOCKS = {'POSIX': posix, 'OFD': ofd, 'flock': flock, 'lease': lease}


def held(brood: Brood) -> list[list[int]]:
    """What another process, with a description of its own, finds locked: (type, start, length), flock as type 99."""
    def work() -> list[list[int]]:
        fd = os.open('file', os.O_RDWR | os.O_NONBLOCK)
        found, at = [], 0
        while at < 1000:
            kind, _, start, length, _ = struct.unpack(FLOCK, fcntl.fcntl(fd, F_OFD_GETLK, struct.pack(
                FLOCK, fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)))
            if kind == fcntl.F_UNLCK:
                at += 1
            else:
                found.append([kind, start, length])
                at = start + length if length else 1000
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found.append([99, 0, 0])
        os.close(fd)
        return found
    return brood.ask(work)[1]


@pytest.fixture
def first() -> Callable[[Callable[[int], None], Bulk], SavedFile]:
    """A record of a locked file whose process has ended."""
    def save(lock: Callable[[int], None], bulk: Bulk, flags: int = os.O_RDWR) -> SavedFile:
        with Brood() as own:
            def work() -> int:
                fd = os.open('file', flags)
                lock(fd)
                return fd
            return saved_of(read_open_file(*own.ask(work)), bulk)
    return save


First = Callable[[Callable[[int], None], Bulk], SavedFile]
SEEN = {'POSIX': (posix, [[fcntl.F_WRLCK, 100, 10], [fcntl.F_RDLCK, 500, 0]], ['fcntl'] * 2),
        'OFD': (ofd, [[fcntl.F_WRLCK, 3, 4]], []),
        'flock': (flock, [[99, 0, 0]], ['flock'])}


@pytest.mark.parametrize(('lock', 'expected', 'calls'), SEEN.values(), ids=SEEN)
def test_others_find_it_locked(first: First, bulk: Bulk, restart: Start, brood: Brood,
                               lock: Callable[[int], None], expected: list[list[int]], calls: list[str]) -> None:
    """calls: what the process itself has to do."""
    saved = first(lock, bulk)
    assert held(brood) == []
    job = restart()
    assert job.obstacles(saved) == []
    job.whole(saved)
    assert held(brood) == expected
    assert [name for name, _ in job.calls] == calls


def test_lease(first: First, bulk: Bulk, restart: Start) -> None:
    job = restart()
    fd = job.whole(first(lease, bulk))
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK


@pytest.mark.parametrize('lock', LOCKS.values(), ids=LOCKS)
def test_somebody_else_has_it(first: First, bulk: Bulk, restart: Start, brood: Brood,
                              lock: Callable[[int], None]) -> None:
    saved = first(lock, bulk)

    def work() -> int:
        fd = os.open('file', os.O_RDWR)
        if lock is not lease:
            lock(fd)
        return fd
    other, _ = brood.ask(work)
    job = restart()
    said = {posix: f'file is locked by process {other}', ofd: 'file is locked by another program'}.get(lock)
    rows = job.obstacles(saved)
    assert [row[:2] for row in rows] == ([('refusal', 'EBUSY')] if said else [])
    assert said is None or rows[0][2].endswith(said)
    fd = job.restore(saved)
    words = {lease: 'file had a write lease, which cannot be taken again while another program has the file open$'}
    with pytest.raises(Busy, match=words.get(lock, 'file is locked by another program')):
        job.finish(saved, fd)


def test_read_lease_of_a_file_that_is_open_for_writing(first: Callable[..., SavedFile], bulk: Bulk, restart: Start,
                                                       brood: Brood) -> None:
    saved = first(lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK), bulk, os.O_RDONLY)
    brood.ask(lambda: os.open('file', os.O_WRONLY))
    job = restart()
    fd = job.restore(saved)
    with pytest.raises(Busy, match='has the file open for writing') as caught:
        job.finish(saved, fd)
    assert 'had a read lease' in str(caught.value)
    assert 'fuser -v' in caught.value.hint


def broken(flags: int) -> Callable[[int], None]:
    """Take a write lease and have another open begin to break it."""
    def work(fd: int) -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        lease(fd)
        with pytest.raises(BlockingIOError):
            os.open('file', flags | os.O_NONBLOCK)
    return work


@pytest.mark.parametrize(('flags', 'becomes'), [(os.O_RDONLY, fcntl.F_RDLCK), (os.O_WRONLY, fcntl.F_UNLCK)])
def test_lease_that_is_being_broken(first: First, bulk: Bulk, restart: Start, flags: int, becomes: int) -> None:
    saved = first(broken(flags), bulk)
    job = restart()
    assert job.obstacles(saved) == []
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fd = job.whole(saved)
        assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == becomes
    finally:
        signal.signal(signal.SIGIO, before)


def test_lease_that_the_user_may_not_break(first: First, bulk: Bulk, restart: Start,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    saved = first(broken(os.O_WRONLY), bulk)
    job = restart()
    monkeypatch.setattr(job, 'may', lambda path, access: access == os.R_OK | os.W_OK)
    [row] = job.obstacles(saved)
    assert row[:2] == ('refusal', 'EACCES')
    assert 'another program waited to write it' in row[2]


def test_lock_of_a_process_without_an_fd(first: First, bulk: Bulk, restart: Start,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    saved = first(posix, bulk)
    job = restart()
    fd = job.restore(saved)
    monkeypatch.setattr(job, 'holders', lambda file_id: [(1, fd), (2, fd)])
    with pytest.raises(NotSupported, match='has a lock and no longer an fd'):
        job.finish(saved, fd)


def test_lock_that_cannot_be_taken(first: First, bulk: Bulk, restart: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> int:
        raise OSError(errno.ENOLCK, 'No locks available')
    saved = first(posix, bulk)
    job = restart()
    fd = job.restore(saved)
    monkeypatch.setattr(job, 'call', no_locks)
    with pytest.raises(CkptError, match='cannot be locked again') as caught:
        job.finish(saved, fd)
    assert caught.value.errno == errno.ENOLCK


def test_file_that_cannot_be_looked_into(first: First, bulk: Bulk, restart: Start,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    saved = first(posix, bulk)
    job = restart()

    def forbidden(path: str, flags: int, mode: int = 0) -> int:
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(job, 'open', forbidden)
    assert job.obstacles(saved) == []


def test_lock_on_a_directory(restart: Start, bulk: Bulk, brood: Brood) -> None:
    def work() -> int:
        fd = os.open('.', os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd

    with Brood() as own:
        saved = saved_of(read_open_file(*own.ask(work)), bulk)
    assert brood.ask(lambda: settled.is_locked(Path()))[1] is False
    job = restart()
    job.whole(saved)
    assert brood.ask(lambda: settled.is_locked(Path()))[1] is True

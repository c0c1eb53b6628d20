# SPDX-License-Identifier: LGPL-2.1-or-later
"""Regular files, directories, memfds, devices: what is recorded, and that recording leaves no trace in the task."""

import fcntl
import os
import pty
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.kernel.tty_drivers import parse_drivers
from ckptd.objects.files.base import Content, FileEnd, OpenFile, read_open_file
from ckptd.objects.files.chardev import CharacterDevice
from ckptd.objects.files.directory import Directory
from ckptd.objects.files.locks import EOF, FLOCK, LEASE, OFD, POSIX, Lock, parse_lock
from ckptd.objects.files.memfd import Memfd
from ckptd.objects.files.regular import Regular
from ckptd.objects.files.terminal.tty import REFERENCE, Tty, is_tty
from tests.lib.brood import Brood
from tests.live.kinds.conftest import Bulk, Restart, kind_of, saved_of

Opened = Callable[[Callable[[], int]], OpenFile]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def dump(file: OpenFile, bulk: Content) -> object:
    """The record, as it is after a journey through an image."""
    kind = kind_of(file)
    return kind.record.decode(kind.dump(file, bulk).encode())


def reasons(file: OpenFile) -> list[tuple[str, str]]:
    return [(reason.severity, reason.errno) for reason in kind_of(file).findings(file)]


# ---------------------------------------------------------------- regular files

def test_named_file(opened: Opened, bulk: Bulk, tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(b'hello')
    file = opened(lambda: os.open('file', os.O_RDONLY))
    record = dump(file, bulk)
    assert isinstance(record, Regular)
    of = (tmp_path / 'file').stat()
    assert (record.path, record.device, record.inode) == (str(tmp_path / 'file'), of.st_dev, of.st_ino)
    assert (record.size, record.mtime, record.mode) == (5, of.st_mtime_ns, of.st_mode)
    assert (record.deleted, record.content, bulk.stretches) == (0, (), [])
    assert reasons(file) == []


def sparse() -> int:
    fd = os.open('gone', os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b'first', 0)
    os.pwrite(fd, b'last', 8 * MIB)
    os.ftruncate(fd, 16 * MIB + 5)
    Path('gone').unlink()
    os.lseek(fd, 3, os.SEEK_SET)
    return fd


def test_deleted_file_with_holes(opened: Opened, bulk: Bulk, tmp_path: Path) -> None:
    file = opened(sparse)
    record = dump(file, bulk)
    assert isinstance(record, Regular)
    assert (record.path, record.deleted, record.links) == (str(tmp_path / 'gone'), 1, 0)
    content = bulk.file(record.size, record.content)
    assert content == b'first' + bytes(8 * MIB - 5) + b'last' + bytes(8 * MIB + 1)
    assert sum(map(len, bulk.stretches)) < MIB
    assert read_open_file(file.pid, file.fd).info.pos == 3      # SEEK_DATA was not on the task's description


def test_deleted_file_open_for_writing_only(opened: Opened, bulk: Bulk) -> None:
    def work() -> int:
        fd = os.open('gone', os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'content')
        Path('gone').unlink()
        return fd
    record = dump(opened(work), bulk)
    assert isinstance(record, Regular)
    assert bulk.file(record.size, record.content) == b'content'


def test_nameless_and_empty_deleted_files(opened: Opened, bulk: Bulk) -> None:
    record = dump(opened(lambda: os.open('.', os.O_RDWR | os.O_TMPFILE)), bulk)
    assert isinstance(record, Regular)
    assert (record.deleted, record.content) == (1, ())


def test_file_that_is_named_like_a_deleted_one(opened: Opened, bulk: Bulk, tmp_path: Path) -> None:
    file = opened(lambda: os.open('x (deleted)', os.O_RDWR | os.O_CREAT))
    record = dump(file, bulk)
    assert isinstance(record, Regular)
    assert (record.deleted, record.path) == (0, f'{tmp_path}/x (deleted)')


def test_deleted_file_with_another_name_needs_the_directory_of_its_old_one(opened: Opened, tmp_path: Path) -> None:
    def work() -> int:
        Path('home').mkdir()
        fd = os.open('home/one', os.O_RDWR | os.O_CREAT)
        os.link('home/one', 'two')
        Path('home/one').unlink()
        return fd
    file = opened(work)
    assert reasons(file) == []
    (tmp_path / 'home').rmdir()
    assert reasons(file) == [('refusal', 'ENOENT')]


def test_path_that_leads_to_another_file_is_a_warning(opened: Opened, brood: Brood, tmp_path: Path) -> None:
    """Seen from outside, a mount over a file leaves its link as it is."""
    file = opened(lambda: os.open('file', os.O_RDWR | os.O_CREAT))
    other = os.stat_result((*file.stat[:1], file.stat.st_ino + 1, *file.stat[2:]))
    covered = OpenFile(file.pid, file.tid, file.fd, file.link, other, file.info)
    assert reasons(covered) == [('warning', 'ENOENT')]


def test_file_of_a_process_is_a_warning(opened: Opened) -> None:
    assert reasons(opened(lambda: os.open('/proc/self/status', os.O_RDONLY))) == [('warning', 'ENOENT')]
    assert reasons(opened(lambda: os.open('/proc/meminfo', os.O_RDONLY))) == []


# ---------------------------------------------------------------- locks

def locked(operation: Callable[[int], object]) -> Callable[[], int]:
    def work() -> int:
        fd = os.open('file', os.O_RDWR | os.O_CREAT)
        operation(fd)
        return fd
    return work


def ofd_lock(fd: int) -> None:
    fcntl.fcntl(fd, 37, struct.pack('hhqqi4x', fcntl.F_RDLCK, os.SEEK_SET, 3, 0, 0))     # F_OFD_SETLK


LOCKS = {
    'POSIX': (lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX, 10, 100), Lock(POSIX, 1, 100, 109, -1)),
    'flock': (lambda fd: fcntl.flock(fd, fcntl.LOCK_SH), Lock(FLOCK, 0, 0, EOF, 0)),
    'OFD': (ofd_lock, Lock(OFD, 0, 3, EOF, 0)),
    'lease': (lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK), Lock(LEASE, 1, 0, EOF, 0)),
}


@pytest.mark.parametrize(('operation', 'expected'), LOCKS.values(), ids=LOCKS)
def test_locks_are_kept(opened: Opened, bulk: Bulk, operation: Callable[[int], object], expected: Lock) -> None:
    file = opened(locked(operation))
    record = dump(file, bulk)
    assert isinstance(record, Regular)
    holder = file.pid if expected.kind == POSIX else 0
    assert record.locks == (Lock(expected.kind, expected.write, expected.start, expected.end, holder),)
    assert reasons(file) == []


def test_posix_locks_of_every_holder(brood: Brood, bulk: Bulk) -> None:
    """A description is dumped once, and each process that has it may hold locks of its own."""
    def parent() -> list[int]:
        fd = locked(lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0))()
        return [fd, brood.fork(lambda: fcntl.lockf(fd, fcntl.LOCK_EX, 1, 5))]
    pid, (fd, child) = brood.ask(parent)
    record = dump(read_open_file(pid, fd, holders=((child, fd),)), bulk)
    assert isinstance(record, Regular)
    assert record.locks == (Lock(POSIX, 1, 0, 0, pid), Lock(POSIX, 1, 5, 5, child))


def test_deleted_and_leased_is_refused(opened: Opened) -> None:
    def work() -> int:
        fd = locked(lambda fd: fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK))()
        Path('file').unlink()
        return fd
    assert reasons(opened(work)) == [('refusal', 'EBUSY')]


def test_delegation_is_not_the_tasks() -> None:
    assert parse_lock('1: DELEG  ACTIVE    READ  359 00:13:11691 0 EOF', 7) is None


# ---------------------------------------------------------------- directories, devices, terminals

def test_directory(opened: Opened, bulk: Bulk, tmp_path: Path) -> None:
    record = dump(opened(lambda: os.open('.', os.O_RDONLY)), bulk)
    assert isinstance(record, Directory)
    assert (record.path, record.inode, record.locks) == (str(tmp_path), tmp_path.stat().st_ino, ())


def test_deleted_fifo_with_O_PATH_is_refused(opened: Opened) -> None:
    def work() -> int:
        os.mkfifo('gone')
        fd = os.open('gone', os.O_PATH)
        Path('gone').unlink()
        return fd
    [row] = kind_of(file := opened(work)).findings(file)
    assert (row.severity, row.errno) == ('refusal', 'EOPNOTSUPP')
    assert row.reason.endswith('gone is a deleted FIFO, open with O_PATH')


def test_deleted_device_is_for_root_to_make_again(opened: Opened, bulk: Bulk, restart: Callable[..., Restart],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> int:
        os.mknod('gone', stat.S_IFCHR | 0o600, os.makedev(1, 3))
        fd = os.open('gone', os.O_RDWR)
        Path('gone').unlink()
        return fd
    saved, job = saved_of(opened(work), bulk), restart()
    assert job.obstacles(saved) == []
    monkeypatch.setattr(job, 'capable', lambda capability: False)
    [row] = job.obstacles(saved)
    assert row[:2] == ('refusal', 'EPERM')
    assert 'only root can make it again' in row[2]


def test_removed_directory(opened: Opened, tmp_path: Path) -> None:
    def work() -> int:
        Path('gone').mkdir()
        fd = os.open('gone', os.O_RDONLY)
        Path('gone').rmdir()
        return fd
    assert reasons(opened(work)) == []


def test_device(opened: Opened, bulk: Bulk) -> None:
    record = dump(opened(lambda: os.open('/dev/full', os.O_RDWR)), bulk)
    assert isinstance(record, CharacterDevice)
    assert (record.path, record.device) == ('/dev/full', os.makedev(1, 7))


def test_terminal_without_its_master_is_a_reference(opened: Opened, bulk: Bulk) -> None:
    file = opened(lambda: pty.openpty()[1])
    record = dump(file, bulk)
    assert isinstance(record, Tty)
    assert record.path.startswith('/dev/pts/')
    assert (record.side, record.pty, reasons(file)) == (REFERENCE, (), [])
    kind = kind_of(file)
    endpoint = kind.endpoint(file)
    assert endpoint
    end = FileEnd(file, endpoint)
    [(told, finding)] = kind.link([end, end], is_whole=True)
    assert (told, finding.severity, finding.errno) == (end, 'warning', 'ENOTTY')


def test_terminal_drivers() -> None:
    drivers = parse_drivers(b'/dev/tty             /dev/tty        5       0 system:/dev/tty\n'
                            b'/dev/ptmx            /dev/ptmx       5       2 system:/dev/ptmx\n'
                            b'serial               /dev/ttyS       4 64-95 serial\n'
                            b'pty_slave            /dev/pts      136 0-1048575 pty:slave\n'
                            b'pty_master           /dev/ptm      128 0-1048575 pty:master\n')
    assert [(driver.major, driver.minors) for driver in drivers] == [(5, range(1)), (4, range(64, 96)),
                                                                     (136, range(1048576))]
    assert not is_tty(os.makedev(5, 2))
    assert not is_tty(os.makedev(1, 3))


# ---------------------------------------------------------------- memfds

def test_memfd(opened: Opened, bulk: Bulk) -> None:
    def work() -> int:
        fd = os.memfd_create('na me (deleted)', os.MFD_ALLOW_SEALING)
        os.pwrite(fd, b'data', 2 * MIB)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return fd
    record = dump(opened(work), bulk)
    assert isinstance(record, Memfd)
    assert (record.name, record.seals, record.shm_id) == ('na me (deleted)', fcntl.F_SEAL_SHRINK, 0)
    assert bulk.file(record.size, record.content) == bytes(2 * MIB) + b'data'


def test_memfd_that_is_dumped_as_shared_memory(opened: Opened) -> None:
    class Sharing(Bulk):
        def shared_memory(self, file: OpenFile) -> int:
            return 7
    bulk = Sharing()
    record = dump(opened(lambda: os.memfd_create('x')), bulk)
    assert isinstance(record, Memfd)
    assert (record.shm_id, record.content, bulk.stretches) == (7, (), [])


# ---------------------------------------------------------------- what all have

def test_owner_of_signals(opened: Opened, brood: Brood) -> None:
    def work() -> int:
        fd = os.pipe()[0]
        fcntl.fcntl(fd, 15, struct.pack('ii', 2, os.getpgrp()))      # F_SETOWN_EX, F_OWNER_PGRP
        fcntl.fcntl(fd, 10, 34)                                      # F_SETSIG
        return fd
    assert opened(work).owner() == (2, os.getpgrp(), 34, os.getuid(), os.geteuid(), 0)
    assert opened(lambda: os.open('.', os.O_PATH)).owner() == (0, 0, 0, 0, 0, 0)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the worker may do, and whoever asks may not: none of that gets into his image, his core, or his tree."""

import contextlib
import ctypes
import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.errors import CkptError, Refused
from ckptd.image.reader import ImageReader
from ckptd.image.records import SYSV, Backing, SavedFile, SharedMemory
from ckptd.kernel.shm import ShmidDs, attached, shmctl_remove, shmctl_stat
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from ckptd.objects.files.registry import BY_TAG
from ckptd.objects.files.regular import Regular
from ckptd.protocol.requests import Caller
from ckptd.restore.file_rights import FileRights
from tests.lib import settled
from tests.lib.altered import rewrite
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, place_of
from tests.worker.test_archive import export, request
from tests.worker.test_owners import BOB, end, refused, restored

pytestmark = [pytest.mark.needs('root', 'ptrace'), pytest.mark.timeout(120)]

Start = Callable[..., 'subprocess.Popen[bytes]']
SECRET = b'for the eyes of root alone'

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def start() -> Iterator[Start]:
    """A Python program of bob's, when it has said a word."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(program: str, **more: object) -> 'subprocess.Popen[bytes]':
        said, theirs = os.pipe()
        process = subprocess.Popen(
            ['/usr/bin/python3', '-c', f'import os\n{program}\nos.write({theirs}, b"x"); os.close({theirs})\n'
                                       'import signal; signal.pause()'],
            pass_fds=[theirs], start_new_session=True, cwd='/', user=ORDINARY_UID, group=ORDINARY_UID, extra_groups=[],
            **{'stdin': subprocess.DEVNULL, 'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL,
               **more})   # type: ignore[call-overload]
        started.append(process)
        os.close(theirs)
        assert os.read(said, 1) == b'x'
        os.close(said)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
    settled.reap_orphans()


@pytest.fixture
def secret() -> Iterator[Path]:
    """In a directory that everybody may enter."""
    with place_of(0) as directory:
        path = directory / 'secret'
        path.write_bytes(SECRET)
        path.chmod(0o600)
        yield path


@pytest.fixture
def bob(start: Start) -> Caller:
    """Who asks, and stays."""
    pid = start('').pid
    return Caller(ORDINARY_UID, ORDINARY_UID, (), pid, 0, read_status(pid).cap_bnd,
                  start_time=read_stat(pid).start_time)


def killed(place: Place, process: 'subprocess.Popen[bytes]', **more: object) -> Path:
    image = place.checkpoint(process.pid, after='kill', caller=BOB, **more)
    process.wait()
    settled.reap_orphans()
    return image


# ---------------------------------------------------------------- cores

def test_a_core_has_no_file_that_the_asker_may_not_read(place: Place, secret: Path, start: Start) -> None:
    """Though the image, which he may have made up, says that it was mapped, and all that stat(2) tells is right."""
    mapped = secret.with_name('mapped')
    mapped.write_bytes(bytes(8192))
    mapped.chmod(0o644)
    process = start(f'import mmap\nfd = os.open({str(mapped)!r}, os.O_RDONLY)\n'
                    'memory = mmap.mmap(fd, 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)\n'
                    'os.close(fd)\nmemory[4096:4100] = b"mine"')
    image = place.checkpoint(process.pid, caller=BOB)
    of = secret.stat()
    rewrite(image, Backing, lambda one: dataclasses.replace(
        one, path=str(secret), device=of.st_dev, inode=of.st_ino, size=of.st_size, mtime=of.st_mtime_ns)
        if one.path == str(mapped) else one)

    def core(caller: Caller) -> bytes:
        path = place.path / 'core.tar'
        with path.open('wb') as file, DirectWorker() as worker:
            worker.run(request(place, 'export', image=image.name, format='core', caller=caller), (file.fileno(),))
        return path.read_bytes()

    assert SECRET not in core(BOB)
    export(place, image, place.path / 'of-root.tar', 'core')
    assert SECRET in (place.path / 'of-root.tar').read_bytes()
    secret.chmod(0o644)
    assert SECRET in core(BOB)


# ---------------------------------------------------------------- System V segments

@contextlib.contextmanager
def segment(mode: int) -> Iterator[int]:
    """One of root's, with the secret in it, used by nobody."""
    shmid = _libc.shmget(0, 4096, mode)
    assert shmid >= 0
    try:
        with attached(shmid, 4096) as view:
            view[:len(SECRET)] = SECRET
        yield shmid
    finally:
        shmctl_remove(shmid)


def attached_image(place: Place, start: Start, shmid: int) -> Path:
    """An image that says that a segment of bob's has that id."""
    process = start('import ctypes\nc = ctypes.CDLL(None); c.shmat.restype = ctypes.c_void_p\n'
                    'i = c.shmget(0, 4096, 0o600)\nctypes.memset(c.shmat(i, None, 0), 0x42, 9)')
    image = killed(place, process)
    with ImageReader(image) as reader:
        [own] = [one.shmid for one in reader.every(SharedMemory) if one.kind == SYSV]
    shmctl_remove(own)
    rewrite(image, SharedMemory, lambda one: dataclasses.replace(one, shmid=shmid) if one.kind == SYSV else one)
    return image


@pytest.mark.parametrize('mode', [0o600, 0o604, 0o602])
def test_a_segment_of_another_user_is_not_taken(place: Place, start: Start, bob: Caller, mode: int) -> None:
    with segment(mode) as shmid:
        image = attached_image(place, start, shmid)
        before = shmctl_stat(shmid)
        [row] = [row for row in refused(place, image, caller=bob) if row.resource == f'shmid {shmid}']
        # who may not read a segment is not told whose it is
        whose = f'belongs to uid {os.getuid()}' if mode & 0o004 else 'of another user'
        assert (row.errno, whose in row.reason) == ('EACCES', True)
        after = shmctl_stat(shmid)
        assert (after.uid, after.gid, after.mode) == (before.uid, before.gid, before.mode)
        with attached(shmid, 4096) as view:
            assert bytes(view[:len(SECRET)]) == SECRET


def test_a_segment_that_he_may_write_stays_whose_it_is(place: Place, start: Start, bob: Caller) -> None:
    with segment(0o606) as shmid:
        image = attached_image(place, start, shmid)
        end(restored(place, image, caller=bob))
        after = shmctl_stat(shmid)
        assert (after.uid, after.gid, after.mode & 0o777) == (os.getuid(), os.getgid(), 0o606)
        with attached(shmid, 4096) as view:
            assert bytes(view[:9]) == b'B' * 9


@pytest.mark.parametrize(('rights', 'mode', 'may', 'owns'), [
    (FileRights(0, 0, ()), 0o000, True, True), (FileRights(7, 1, ()), 0o600, True, True),
    (FileRights(8, 1, ()), 0o600, True, True),
    (FileRights(7, 1, ()), 0o466, False, True), (FileRights(1, 9, ()), 0o060, True, False),
    (FileRights(1, 1, (10,)), 0o060, True, False), (FileRights(1, 9, ()), 0o606, False, False),
    (FileRights(1, 1, ()), 0o006, True, False), (FileRights(1, 1, ()), 0o004, False, False),
    (FileRights(1, 1, ()), 0o660, False, False)], ids=str)
def test_who_may_write_a_segment(rights: FileRights, mode: int, may: bool, owns: bool) -> None:
    found = ShmidDs(1, 2, mode, 7, 9, 8, 10, 4096, 0, 0, 0)
    assert (rights.may_write(found), rights.owns(found)) == (may, owns)


# ---------------------------------------------------------------- /proc

def opens_instead(place: Place, start: Start, path: Callable[[int], str]) -> tuple[Path, int]:
    """An image of a process that has its maps open, by another name; the process."""
    process = start('own = os.open("/proc/self/maps", os.O_RDONLY)')
    image = killed(place, process)

    def change(one: SavedFile) -> SavedFile:
        if one.link != f'/proc/{process.pid}/maps':
            return one
        record = BY_TAG[one.kind].record.decode(one.data)
        assert isinstance(record, Regular)
        return dataclasses.replace(one, data=dataclasses.replace(record, path=path(process.pid)).encode())

    rewrite(image, SavedFile, change)
    return image, process.pid


def test_what_its_own_processes_show_is_opened_again(place: Place, start: Start, bob: Caller) -> None:
    image, pid = opens_instead(place, start, lambda pid: f'/proc/{pid}/smaps')
    assert restored(place, image, caller=bob) == pid
    assert f'/proc/{pid}/smaps' in [os.readlink(one.path) for one in os.scandir(f'/proc/{pid}/fd')]     # noqa: PTH115
    end(pid)


@pytest.mark.parametrize('name', ['../{us}/maps', '../{us}/environ', 'cwd/../proc/{us}/maps', 'root/proc/{us}/maps',
                                  'task/{pid}/../../../{us}/maps', 'task/{pid}/cwd/proc/{us}/maps'])
def test_no_way_leads_from_there_to_others(place: Place, start: Start, bob: Caller, name: str) -> None:
    image, pid = opens_instead(place, start, lambda pid: f'/proc/{pid}/{name.format(us=os.getpid(), pid=pid)}')
    with DirectWorker() as worker, pytest.raises(CkptError, match='Permission denied'):
        worker.run(place.request(0, operation='restore', image=image.name, caller=bob))
    settled.reap_orphans()
    assert not Path(f'/proc/{pid}').exists()


# ---------------------------------------------------------------- files that are only written

def saved(image: Path, path: Path) -> tuple[bool, bytes, bool]:
    """Whether the image has the file, the digest of its end, and whether the secret is anywhere in the image."""
    with ImageReader(image) as reader:
        found = [BY_TAG[one.kind].record.decode(one.data) for one in reader.every(SavedFile) if one.link == str(path)]
    regular = [one for one in found if isinstance(one, Regular)]
    return (any(one.is_saved for one in regular), max(one.tail for one in regular),
            any(SECRET in part.read_bytes() for part in image.iterdir()))


@contextlib.contextmanager
def written_by_bob(secret: Path, start: Start, program: str = '') -> Iterator[int]:
    """As a service whose log is opened for it, or the command of a `sudo -u bob ... >> log`."""
    with secret.open('ab', buffering=0) as log:
        yield start(program, stdout=log).pid


def test_a_file_that_is_only_written_is_not_read_for_it(place: Place, secret: Path, start: Start) -> None:
    with written_by_bob(secret, start) as pid:
        with DirectWorker() as worker:
            result = worker.run(place.request(pid, caller=BOB, save_files=True))
        [row] = [row for row in result['warnings'] if f'{secret} is not saved' in row['reason']]
        assert (row['errno'], 'is writable, but not readable' in row['reason']) == ('EACCES', True)
        assert saved(place.spool / str(result['image']), secret) == (False, b'', False)
        assert saved(place.checkpoint(pid, caller=BOB), secret) == (False, b'', False)
        done, tail, there = saved(place.checkpoint(pid, save_files=True, as_root=True), secret)
        assert (done, len(tail), there) == (True, 16, True)


def test_one_that_the_asker_may_read_is(place: Place, secret: Path, start: Start) -> None:
    secret.chmod(0o644)
    with written_by_bob(secret, start) as pid:
        assert saved(place.checkpoint(pid, caller=BOB, save_files=True), secret)[::2] == (True, True)


def test_one_that_the_tree_has_open_for_reading_is(place: Place, secret: Path, start: Start) -> None:
    with secret.open('rb') as file, written_by_bob(secret, start) as pid:
        assert not saved(place.checkpoint(pid, caller=BOB, save_files=True), secret)[0]
        with secret.open('ab', buffering=0) as log:
            both = start('', stdout=log, stdin=file)
        assert saved(place.checkpoint(both.pid, caller=BOB, save_files=True), secret)[::2] == (True, True)


def test_one_that_is_deleted_is_refused(place: Place, secret: Path, start: Start) -> None:
    """There is no restart without what is in it."""
    with written_by_bob(secret, start) as pid:
        secret.unlink()
        with pytest.raises(Refused, match='its content cannot be read') as caught:
            place.checkpoint(pid, caller=BOB)
        assert [row.errno for row in caught.value.refusals] == ['EACCES']
        place.checkpoint(pid, as_root=True)


def test_a_memfd_of_another_user(place: Place, start: Start) -> None:
    fd = os.memfd_create('secret', 0)
    os.fchmod(fd, 0o600)
    os.write(fd, SECRET)
    log = os.open(f'/proc/self/fd/{fd}', os.O_WRONLY)
    process = start('', stdout=log)
    os.close(log)
    os.close(fd)
    with pytest.raises(Refused, match='is not readable'):
        place.checkpoint(process.pid, caller=BOB)
    place.checkpoint(process.pid, as_root=True)
    os.kill(process.pid, signal.SIGKILL)

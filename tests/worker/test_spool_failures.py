# SPDX-License-Identifier: LGPL-2.1-or-later
"""A spool that is full, read-only, over quota or gone: a clear error, the tree unharmed, nothing left."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from ckptd.errors import SpoolFailed
from ckptd.image.archive.pack import write_archive
from ckptd.image.archive.unpack import destination_in, read_archive
from tests.lib import settled
from tests.lib.bus import Daemon
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker, Place
from tests.worker.faulty import Gate, api
from tests.worker.unharmed import Subject, left_in_journal, left_in_spool

pytestmark = pytest.mark.needs('root', 'ptrace', 'gcc')

MIB = 1 << 20
ENOUGH = 24 * MIB       # for the daemon to begin; the counters have some 20 MiB
OWN = 14 * MIB          # of a program, its interpreter not counted


@contextlib.contextmanager
def mounted(at: Path, *arguments: str | Path) -> Iterator[Path]:
    """mount(8) for the time of the block; skips the test where the kernel or the container does not let us."""
    at.mkdir(exist_ok=True)
    done = subprocess.run(['mount', *arguments, at], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f'needs mount: {done.stderr.strip()}')
    try:
        yield at
    finally:
        subprocess.run(['umount', '--lazy', at], check=False, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own with an empty spool in it."""
    with mounted(tmp_path / 'disk', '-t', 'tmpfs', '-o', f'size={ENOUGH}', 'none') as at:
        yield at


@pytest.fixture
def subject(victim: Callable[..., Victim]) -> Subject:
    return Subject.of(victim('counter'))


def refused(subject: Subject, place: Place, words: str, number: int) -> SpoolFailed:
    """A checkpoint fails so; the victim is unharmed, and nothing is left. The error."""
    with pytest.raises(SpoolFailed, match=words) as caught:
        place.checkpoint(subject.victim.pid)
    assert caught.value.errno == number
    assert caught.value.hint
    assert subject.wrong() == []
    assert list(left_in_journal(place.runtime)) == []
    assert subject.finish() == []
    return caught.value


def test_hardly_any_room(subject: Subject, disk: Path) -> None:
    """Nothing is begun: the tree is not even frozen."""
    place = Place(disk).make()
    (disk / 'others').write_bytes(bytes(10 * MIB))
    error = refused(subject, place, r'has only 1\d MiB free', errno.ENOSPC)
    assert error.phase == 'scan'
    assert list(place.spool.iterdir()) == []


def test_read_only(subject: Subject, disk: Path, tmp_path: Path) -> None:
    place = Place(disk).make()
    with mounted(tmp_path / 'same', '--bind', disk / 'spool'):
        subprocess.run(['mount', '-o', 'remount,bind,ro', tmp_path / 'same'], check=True)
        with pytest.raises(SpoolFailed, match='Read-only file system'), DirectWorker() as worker:
            worker.run(place.request(subject.victim.pid, spool=str(tmp_path / 'same')))
    assert list(place.spool.iterdir()) == []
    assert subject.wrong() == []
    assert subject.finish() == []


def test_vanished(subject: Subject, tmp_path: Path) -> None:
    place = Place(tmp_path).make()
    place.spool.rmdir()
    refused(subject, place, 'No such file or directory', errno.ENOENT)
    assert not place.spool.exists()


def test_not_a_directory(subject: Subject, tmp_path: Path) -> None:
    place = Place(tmp_path).make()
    place.spool.rmdir()
    place.spool.touch()
    refused(subject, place, 'Not a directory', errno.ENOTDIR)
    assert place.spool.read_bytes() == b''


def test_a_file_size_limit(subject: Subject, tmp_path: Path) -> None:
    """RLIMIT_FSIZE of the daemon: SIGXFSZ would kill it."""
    place = Place(tmp_path).make()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        refused(subject, place, 'File too large', errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(place.spool.iterdir()) == []


# ---------------------------------------------------------------- what is to stay free

def free(disk: Path) -> int:
    at = os.statvfs(disk)
    return at.f_bavail * at.f_frsize


def test_a_checkpoint_is_not_begun_where_too_little_would_stay_free(subject: Subject, disk: Path) -> None:
    place = Place(disk).make()
    with pytest.raises(SpoolFailed, match='must stay free') as caught:
        place.checkpoint(subject.victim.pid, keep_free=10 * MIB)
    assert (caught.value.errno, caught.value.phase) == (errno.ENOSPC, 'scan')
    assert 'KeepFree=' in caught.value.hint
    assert [*place.spool.iterdir(), *left_in_journal(place.runtime)] == []
    assert [*subject.wrong(), *subject.finish()] == []


@pytest.fixture
def large() -> Iterator[subprocess.Popen[bytes]]:
    """A program with 14 MiB of its own, that says so."""
    program = f'data = b"x" * {OWN}; print(flush=True); input(); print(data.count(b"x"))'
    with subprocess.Popen([sys.executable, '-c', program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_checkpoint_ends_before_too_little_stays_free(large: 'subprocess.Popen[bytes]', disk: Path) -> None:
    """How much memory it has, nobody knows before; the file system would take it, and what is to stay free not."""
    place, keep_free = Place(disk).make(), 7 * MIB + MIB // 2
    with pytest.raises(SpoolFailed, match='must stay free') as caught:
        place.checkpoint(large.pid, keep_free=keep_free)
    assert (caught.value.errno, 'KeepFree=' in caught.value.hint) == (errno.ENOSPC, True)
    assert [*place.spool.iterdir(), *left_in_journal(place.runtime)] == []
    assert large.communicate(b'\n')[0] == b'%d\n' % OWN


@pytest.mark.parametrize('how', ['appended', 'saved'])
def test_a_rollback_keeps_no_more_than_stays_free(disk: Path, tmp_path: Path, how: str) -> None:
    """What it keeps of files is no image and has no quota: it counts like one all the same."""
    place, path = Place(disk).make(), tmp_path / 'file'
    path.write_bytes(b'a' * MIB)
    with path.open('r+b') as file:
        process = subprocess.Popen(['/bin/sleep', '1000'], stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.DEVNULL, start_new_session=True)
    image = place.checkpoint(process.pid, after='kill', save_files=how == 'saved')
    process.wait()
    settled.reap_orphans()
    before = b'b' * MIB if how == 'saved' else b'a' * MIB
    path.write_bytes(before + b'm' * 10 * MIB)
    now = path.stat()
    request = place.request(0, operation='restore', image=image.name, changed_files='rollback')

    def run(keep_free: int) -> int:
        with DirectWorker() as worker:
            return int(worker.run(msgspec.structs.replace(request, keep_free=keep_free))['root'])
    with pytest.raises(SpoolFailed, match='must stay free') as caught:
        run(free(disk) - 9 * MIB)
    settled.reap_orphans()
    assert (caught.value.errno, 'KeepFree=' in caught.value.hint) == (errno.ENOSPC, True)
    assert path.read_bytes() == before + b'm' * 10 * MIB
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (now.st_mtime_ns, now.st_ino)
    assert [*(entry.name for entry in place.spool.iterdir()), *left_in_journal(place.runtime)] == [image.name]
    root = run(free(disk) - 12 * MIB)
    os.kill(root, signal.SIGKILL)
    settled.reap_orphans()
    assert path.read_bytes() == b'a' * MIB


def test_a_checkpoint_that_leaves_enough(subject: Subject, tmp_path: Path) -> None:
    place = Place(tmp_path).make()
    place.checkpoint(subject.victim.pid, keep_free=MIB)
    assert [*subject.wrong(), *subject.finish()] == []


class Neighbour:
    """Watches an import, and when it is half done takes some room himself."""

    def __init__(self, disk: Path, takes: int) -> None:
        self._disk, self._takes = disk, takes
        self.left: list[int] = []

    def phase(self, name: str) -> None:
        pass

    def wait_readable(self, fd: int) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        if 2 * done > total and self._takes:
            (self._disk / 'others').write_bytes(bytes(self._takes))
            self._takes = 0
        self.left.append(free(self._disk))


@pytest.fixture
def stream(subject: Subject, tmp_path: Path) -> Iterator[int]:
    """The fd of an image as a stream."""
    image = Place(tmp_path).make().checkpoint(subject.victim.pid)
    assert subject.finish() == []
    fd = os.memfd_create('stream')
    write_archive(image, fd)
    os.lseek(fd, 0, os.SEEK_SET)
    yield fd
    os.close(fd)


def test_an_import_leaves_what_is_to_stay_free(stream: int, disk: Path) -> None:
    """Nothing is begun where there is too little, nor goes on when somebody else takes it."""
    spool, size = Place(disk).make().spool, os.fstat(stream).st_size
    watcher, keep_free = Neighbour(disk, 0), free(disk) - size // 2
    with pytest.raises(SpoolFailed, match='must stay free'):
        read_archive(stream, destination_in(spool, keep_free), 1, 1, 1 << 30, watcher, keep_free)
    assert (watcher.left, list(spool.iterdir())) == ([], [])
    os.lseek(stream, 0, os.SEEK_SET)
    keep_free = free(disk) - size - MIB
    watcher = Neighbour(disk, 2 * MIB)
    with pytest.raises(SpoolFailed, match='must stay free') as caught:
        read_archive(stream, destination_in(spool, keep_free), 1, 1, 1 << 30, watcher, keep_free)
    assert 'KeepFree=' in caught.value.hint
    assert min(watcher.left) >= keep_free
    assert list(spool.iterdir()) == []
    (disk / 'others').unlink()
    os.lseek(stream, 0, os.SEEK_SET)
    image = read_archive(stream, destination_in(spool, keep_free), 1, 1, 1 << 30, Neighbour(disk, 0), keep_free).image
    assert [path.name for path in spool.iterdir()] == [image]


def test_an_import_by_a_worker(stream: int, disk: Path) -> None:
    place = Place(disk).make()
    with DirectWorker() as worker, pytest.raises(SpoolFailed, match='must stay free'):
        worker.run(place.request(0, operation='import', keep_free=20 * MIB),
                   (stream,))
    assert list(place.spool.iterdir()) == []


# ---------------------------------------------------------------- the spool fails while it is written

def fill(spool: Path) -> None:
    """Leave no page free."""
    with (spool.parent / 'others').open('wb', buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(MIB))


def remove(spool: Path) -> None:
    shutil.rmtree(spool)


def move(spool: Path) -> None:
    spool.rename(spool.with_name('elsewhere'))


def unmount(spool: Path) -> None:
    subprocess.run(['umount', '--lazy', spool.parent], check=True)


@pytest.mark.needs('dbus', 'cgroup2')
@pytest.mark.parametrize('point', ['freeze-freeze-done', 'state-read', 'memory-half', 'released', 'written', 'sealed'])
@pytest.mark.parametrize('happens', [fill, remove, move, unmount], ids=lambda happens: str(happens.__name__))
async def test_at_work(happens: Callable[[Path], None], point: str, disk: Path, tmp_path: Path,
                       victim: Callable[..., Victim]) -> None:
    subject = Subject.of(victim('counter'))
    spool = disk / 'spool'
    gate = Gate()
    with Daemon(tmp_path, spool, env=gate.environment) as daemon:
        async with api(daemon) as client:
            job = await client.checkpoint(subject.victim.pid, {'freeze': 'cgroup'})
            with await gate.stand(point) as standing:
                happens(spool)
                standing.answer()
                async with gate.open():
                    after = await client.ended(job)
                    await standing.gone()
        gate.close()
        assert subject.wrong() == []
        assert list(left_in_journal(daemon.runtime)) == []
    expect_failure(happens, point, after)
    for where in (spool, spool.with_name('elsewhere')):
        if where.exists():
            assert list(left_in_spool(where)) == []
    assert subject.finish() == []


def expect_failure(happens: Callable[[Path], None], point: str, job: dict[str, object]) -> None:
    """What became of the job: an error of the spool, unless all that it needed was there already."""
    if happens is fill and point == 'sealed' and job['State'] == 'done':
        return      # the manifest fitted into a page that was there
    assert job['State'] == 'failed', job
    error = job['Error']
    assert isinstance(error, dict)
    assert error['name'] == 'org.ckptd1.Error.SpoolFailed', error
    assert error['errno'] in ('ENOSPC', 'ENOENT')
    assert error['hint']


# ---------------------------------------------------------------- what no file system does on demand

# calls on files of an unfinished image fail with the errno in FAIL
FAILING = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int failing(int fd, const char *call)
{
    const char *fail = getenv(call);
    char link[64], path[4096] = "";

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (fail == NULL || readlink(link, path, sizeof path - 1) < 0 || strstr(path, "/.incoming-") == NULL)
        return 0;
    errno = atoi(fail);
    return 1;
}

ssize_t pwrite64(int fd, const void *buffer, size_t size, off64_t offset)
{
    return failing(fd, "FAIL_PWRITE") ? -1 : syscall(SYS_pwrite64, fd, buffer, size, offset);
}

ssize_t write(int fd, const void *buffer, size_t size)
{
    return failing(fd, "FAIL_WRITE") ? -1 : syscall(SYS_write, fd, buffer, size);
}

int fsync(int fd)
{
    return failing(fd, "FAIL_FSYNC") ? -1 : (int)syscall(SYS_fsync, fd);
}
"""


@pytest.fixture(scope='module')
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload."""
    library = tmp_path_factory.mktemp('failing') / 'failing.so'
    subprocess.run(['gcc', '-shared', '-fPIC', '-O1', '-x', 'c', '-', '-o', library], input=FAILING, text=True,
                   check=True)
    return library


@pytest.mark.parametrize('call', ['PWRITE', 'WRITE', 'FSYNC'])
@pytest.mark.parametrize('error', [errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_over_quota_or_broken(failing: Path, call: str, error: int, tmp_path: Path, subject: Subject) -> None:
    place = Place(tmp_path).make()
    environment = {'LD_PRELOAD': str(failing), f'FAIL_{call}': str(error)}
    with pytest.raises(SpoolFailed, match=os.strerror(error)) as caught, DirectWorker(env=environment) as worker:
        worker.run(place.request(subject.victim.pid))
    assert caught.value.errno == error
    assert '--spool DIR' in caught.value.hint
    assert [*place.spool.iterdir(), *place.freezes] == []
    assert [*subject.wrong(), *subject.finish()] == []

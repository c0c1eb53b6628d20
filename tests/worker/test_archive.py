# SPDX-License-Identifier: LGPL-2.1-or-later
"""Export and import by a worker: a real image travels and is restored; whoever stalls at the other end is let go of."""

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ckptd.errors import (
    Cancelled,
    CkptError,
    ImageDamaged,
    InvalidArgument,
    LimitsExceeded,
    NoSuchImage,
    PermissionDenied,
    WorkerDied,
)
from ckptd.faults import IMPORT_POINTS
from ckptd.image.manifest import NAME, read_manifest
from ckptd.image.verify import verify
from ckptd.image.writer import INCOMING, remove_stale
from ckptd.kernel.creds import CAP_DAC_READ_SEARCH
from ckptd.kernel.status import read_status
from ckptd.protocol.messages import IMPORT_PHASES, Cancel, Finished, Phase, ProgressReport, Start
from ckptd.protocol.requests import Caller, Request
from tests.lib.procdiff import changes_of_restart
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker, Place, me
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']       # a fixture

pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

STRANGER = Caller(1234, 4321)


@pytest.fixture
def other(tmp_path: Path) -> Place:
    """Another machine, as it were."""
    path = tmp_path / 'other'
    path.mkdir()
    return Place(path).make()


@pytest.fixture(scope='module')
def home(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where the images are made."""
    return Place(tmp_path_factory.mktemp('home')).make()


@pytest.fixture(scope='module')
def image(home: Place) -> Path:
    """Of some MiB, more than any pipe takes."""
    victim = Victim('memory', directory=home.path / 'victim')
    try:
        return home.checkpoint(victim.start().pid)
    finally:
        victim.close()


@pytest.fixture(scope='module')
def stream(home: Place, image: Path) -> Path:
    path = home.path / 'image.tar'
    export(home, image, path)
    return path


def request(place: Place, operation: str, **more: Any) -> Request:
    return place.request(0, operation=operation, **more)


def export(place: Place, image: Path, path: Path, format_: str = 'tar') -> list[str]:
    with path.open('wb') as file, DirectWorker() as worker:
        result = worker.run(request(place, 'export', image=image.name, format=format_), (file.fileno(),))
    return list(result['files'])


def take_in(place: Place, path: Path, env: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    with path.open('rb') as file, DirectWorker(env=env) as worker:
        return worker.run(request(place, 'import', **{'caller': STRANGER, **more}), (file.fileno(),))


def in_spool(place: Place) -> list[str]:
    return sorted(path.name for path in place.spool.iterdir())


def test_a_tree_travels(generation: Callable[..., Generation], place: Place, other: Place, tmp_path: Path) -> None:
    """Exported, looked at by tar, imported by another user elsewhere, and restored from there."""
    tree = generation('tree')
    before = tree.look()
    image = tree.kill()
    path = tmp_path / 'image.tar'
    files = export(place, image, path)
    shown = subprocess.run(['tar', 'tvf', path, '--numeric-owner'], capture_output=True, text=True, check=True)
    assert shown.stderr == ''
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert rows[0][:2] == ['drwx------', '0/0']
    assert [(row[0], row[1], int(row[2]), row[-1]) for row in rows[1:]] == [
        ('-rw-------', '0/0', (place.spool / name).stat().st_size, name) for name in files]
    assert files[:2] == [f'{image.name}/{NAME}', f'{image.name}/tree.img']
    result = take_in(other, path)
    name = result['image']
    assert result == {'image': name, 'bytes': read_manifest(image).size}
    there = other.spool / name
    assert verify(there) == []
    assert read_manifest(there) == msgspec.structs.replace(read_manifest(image), image=name, owner_uid=1234,
                                                           owner_gid=4321, imported=True)
    with DirectWorker() as worker, pytest.raises(PermissionDenied, match='runs as uid 0, and is restored for uid 1234'):
        worker.run(other.request(0, operation='restore', image=name))
    mine = take_in(other, path, caller=me())['image']
    with DirectWorker() as worker:
        restored = worker.run(other.request(0, operation='restore', image=mine))
    assert restored['root'] == tree.victim.pid
    assert changes_of_restart(before, tree.look()) == []
    tree.finish()


@pytest.mark.parametrize('kind', ['pipe', 'socket'])
def test_from_worker_to_worker(home: Place, other: Place, image: Path, kind: str) -> None:
    """Without a file in between, as over ssh."""
    reader, writer = os.pipe() if kind == 'pipe' else (one.detach() for one in socket.socketpair())
    with DirectWorker() as receiver, DirectWorker() as sender:
        receiver.send(Start(request(other, 'import', caller=STRANGER)), (reader,))
        os.close(reader)
        sender.send(Start(request(home, 'export', image=image.name, format='tar')), (writer,))
        os.close(writer)
        sender.result()
        assert verify(other.spool / receiver.result()['image']) == []


def test_who_sends_a_stream_does_not_learn_which_ids_there_are(other: Place, image: Path, stream: Path) -> None:
    """Of images that may be somebody else's."""
    found = [take_in(other, stream)['image'] for _ in range(2)]         # it is free
    found.append(take_in(other, stream, caller=me())['image'])
    found += [take_in(other, stream)['image'] for _ in range(2)]        # and now it is not
    assert [name == image.name for name in found] == [False, False, True, False, False]
    assert {name[:-4] for name in found} == {image.name[:-4]}
    assert in_spool(other) == sorted(set(found))


def test_twice(other: Place, image: Path, stream: Path) -> None:
    first, second = (take_in(other, stream, caller=me())['image'] for _ in range(2))
    assert first == image.name
    assert in_spool(other) == sorted({first, second})
    assert read_manifest(other.spool / second).image == second
    assert verify(other.spool / second) == []


def test_phases_and_progress(other: Place, stream: Path) -> None:
    phases, reports = [], []
    with stream.open('rb') as file, DirectWorker() as worker:
        worker.send(Start(request(other, 'import')), (file.fileno(),))
        while not isinstance(message := worker.receive(), Finished):
            match message:
                case Phase(name):
                    phases.append(name)
                case ProgressReport():
                    reports.append(message)
    assert tuple(phases) == IMPORT_PHASES
    size = message.result['bytes']
    assert reports
    assert all((one.bytes_total, one.tasks_total) == (size, 0) and one.bytes_done <= size for one in reports)


# ---------------------------------------------------------------- what is refused

def refused(place: Place, path: Path, kind: type[CkptError], words: str, **more: Any) -> CkptError:
    with pytest.raises(kind, match=words) as caught:
        take_in(place, path, **more)
    assert in_spool(place) == []
    return caught.value


def test_a_stream_that_ends_early(other: Place, stream: Path) -> None:
    size = stream.stat().st_size
    for end in (0, 5000, size // 2, size - 1):
        part = other.path / f'{end}.tar'
        with stream.open('rb') as whole:
            part.write_bytes(whole.read(end))
        error = refused(other, part, ImageDamaged, 'ends at byte')
        assert error.phase == 'receive'


def test_a_stream_of_cores_is_no_image(home: Place, other: Place, image: Path, tmp_path: Path) -> None:
    path = tmp_path / 'cores.tar'
    export(home, image, path, 'core')
    assert 'export --format tar' in refused(other, path, ImageDamaged, 'GNU.sparse').hint


def test_a_flipped_bit_in_memory(other: Place, stream: Path) -> None:
    flipped = bytearray(stream.read_bytes())
    flipped[-1 << 20] ^= 1
    path = other.path / 'flipped.tar'
    path.write_bytes(flipped)
    error = refused(other, path, ImageDamaged, r'data-0\.img: its digest')
    assert error.phase == 'verify'


def test_a_limit(other: Place, image: Path, stream: Path) -> None:
    size = read_manifest(image).size
    refused(other, stream, LimitsExceeded, f'{size - 1} are allowed', size_limit=size - 1)
    assert take_in(other, stream, size_limit=size)['bytes'] == size


def test_requests_that_cannot_be(home: Place) -> None:
    pidfd = os.pidfd_open(os.getpid())      # never readable while the process lives
    with DirectWorker() as worker, pytest.raises(InvalidArgument, match='not a stream'):
        worker.run(request(home, 'import'), (pidfd,))
    os.close(pidfd)
    with DirectWorker() as worker, pytest.raises(InvalidArgument, match='not a stream'):
        worker.run(home.request(0, operation='import'))
    with Path('/dev/null').open('wb') as sink, DirectWorker() as worker, pytest.raises(NoSuchImage):
        worker.run(request(home, 'export', image='nothing', format='tar'), (sink.fileno(),))


# ---------------------------------------------------------------- who stalls, and who has enough

def wait_full(fd: int) -> None:
    """Until nothing fits in: poll(2) tells of room, not of its end, so look while the writer is at it."""
    while select.select([], [fd], [], 0)[1]:
        os.sched_yield()


def wait_empty(fd: int) -> None:
    """Until all was read."""
    while struct.unpack('i', fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]:
        os.sched_yield()


@contextmanager
def sending(place: Place, **more: Any) -> Iterator[tuple[DirectWorker, int]]:
    """A worker that imports, and the pipe that it reads from; the other end is the worker's alone."""
    reader, writer = os.pipe()
    try:
        with DirectWorker() as worker:
            worker.send(Start(request(place, 'import', **more)), (reader,))
            os.close(reader)
            assert worker.receive() == Phase('receive')
            yield worker, writer
    finally:
        os.close(writer)


def by_message(worker: DirectWorker) -> None:
    worker.send(Cancel())


def by_signal(worker: DirectWorker) -> None:
    os.kill(worker.pid, signal.SIGTERM)


@pytest.mark.parametrize('cancel', [by_message, by_signal])
@pytest.mark.parametrize('part', [0, 100, 4096, 1 << 20])
def test_a_sender_that_stalls(other: Place, stream: Path, part: int, cancel: Callable[[DirectWorker], None]) -> None:
    """In front of all, in the manifest, in the parts."""
    with sending(other) as (worker, writer):
        with stream.open('rb') as file:
            os.write(writer, file.read(part))
        wait_empty(writer)
        if part == 1 << 20:
            assert [name[:len(INCOMING)] for name in in_spool(other)] == [INCOMING]
        cancel(worker)
        with pytest.raises(Cancelled):
            worker.result()
    assert in_spool(other) == []


@pytest.mark.parametrize('cancel', [by_message, by_signal])
@pytest.mark.parametrize('format_', ['tar', 'core'])
@pytest.mark.parametrize('kind', ['pipe', 'socket'])
def test_a_reader_that_stalls(home: Place, image: Path, format_: str, kind: str,
                              cancel: Callable[[DirectWorker], None]) -> None:
    ours, theirs = os.pipe() if kind == 'pipe' else (one.detach() for one in socket.socketpair())
    try:
        with DirectWorker() as worker:
            worker.send(Start(request(home, 'export', image=image.name, format=format_)), (theirs,))
            wait_full(theirs)
            cancel(worker)
            with pytest.raises(Cancelled):
                worker.result()
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize('format_', ['tar', 'core'])
def test_a_reader_that_stalls_for_too_long(home: Place, image: Path, format_: str) -> None:
    reader, writer = os.pipe()
    try:
        with DirectWorker() as worker:
            worker.send(Start(request(home, 'export', image=image.name, format=format_, stall_usec=300_000)), (writer,))
            with pytest.raises(CkptError, match='the stream was not read') as caught:
                worker.result()
    finally:
        os.close(reader)
        os.close(writer)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_slow_reader_is_none_that_stalls(home: Place, image: Path, stream: Path) -> None:
    """For much longer than is allowed in all, a little again and again."""
    reader, writer = os.pipe()
    with open(reader, 'rb', buffering=0) as source, DirectWorker() as worker:   # noqa: PTH123 - an fd
        worker.send(Start(request(home, 'export', image=image.name, format='tar', stall_usec=2_000_000)), (writer,))
        os.close(writer)
        got = b''
        for _ in range(12):
            select.select([], [], [], 0.25)     # as a reader does who takes his time
            got += source.read(1 << 16)
        got += b''.join(iter(lambda: source.read(1 << 20), b''))
        worker.result()
    assert got == stream.read_bytes()


@pytest.mark.parametrize('part', [0, 1 << 20])
def test_a_sender_that_stalls_for_too_long(other: Place, stream: Path, part: int) -> None:
    with stream.open('rb') as file:
        start = file.read(part)
    with sending(other, stall_usec=2_000_000) as (worker, writer):
        os.write(writer, start)
        with pytest.raises(CkptError, match='nothing arrived on the stream') as caught:
            worker.result()
    assert caught.value.errno == errno.ETIMEDOUT
    assert in_spool(other) == []


@pytest.mark.parametrize('format_', ['tar', 'core'])
def test_what_is_written_to_somebodys_fd_is_written_by_his_rights(home: Place, image: Path, format_: str) -> None:
    """Root's would do more than they should with some files that are written to."""
    reader, writer = os.pipe()
    with DirectWorker() as worker:
        worker.send(Start(request(home, 'export', image=image.name, format=format_, writer=STRANGER)), (writer,))
        wait_full(writer)
        status = read_status(worker.pid)
        os.close(writer)
        with open(reader, 'rb') as source:      # noqa: PTH123 - an fd
            assert len(source.read()) > 1 << 20
        worker.result()
    assert (set(status.uids), set(status.gids)) == ({STRANGER.uid}, {STRANGER.gid})
    assert status.groups == STRANGER.groups
    assert status.cap_eff == 1 << CAP_DAC_READ_SEARCH


def test_a_reader_that_goes_away(home: Place, image: Path) -> None:
    reader, writer = os.pipe()
    with DirectWorker() as worker:
        worker.send(Start(request(home, 'export', image=image.name, format='tar')), (writer,))
        wait_full(writer)
        os.close(reader)
        os.close(writer)
        with pytest.raises(CkptError, match='Broken pipe') as caught:
            worker.result()
    assert caught.value.errno == errno.EPIPE


def test_a_daemon_that_dies(other: Place, stream: Path) -> None:
    """End-of-file is a cancel. The sender has not ended."""
    with sending(other) as (_, writer), stream.open('rb') as file:
        os.write(writer, file.read(1 << 20))
        wait_empty(writer)
        assert in_spool(other) != []
    assert in_spool(other) == []


@pytest.mark.parametrize('point', sorted(IMPORT_POINTS))
def test_faults(other: Place, stream: Path, point: str) -> None:
    with pytest.raises(CkptError, match=f'fault at {point}'):
        take_in(other, stream, env={'CKPTD_FAULT': f'{point}=error:EIO'})
    assert in_spool(other) == []
    with pytest.raises(WorkerDied, match='was killed by SIGKILL'):
        take_in(other, stream, env={'CKPTD_FAULT': f'{point}=kill'})
    assert in_spool(other) == []        # its broker has seen to that
    with pytest.raises(AssertionError, match='the worker died'):
        take_in(other, stream, env={'CKPTD_FAULT': f'{point}=kill'}, caller=me())
    [left] = in_spool(other)
    assert left.startswith(INCOMING)
    assert remove_stale(other.spool) == [left.removeprefix(INCOMING)]
    assert in_spool(other) == []

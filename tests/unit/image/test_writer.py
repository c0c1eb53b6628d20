# SPDX-License-Identifier: LGPL-2.1-or-later
"""ImageWriter: published whole or never seen, a failing disk is a clear error, and nothing is left behind."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import SpoolFailed
from ckptd.image import records as r
from ckptd.image.manifest import read_manifest
from ckptd.image.pages import RUNS_PER_RECORD, DataWriter, page_runs
from ckptd.image.reader import ImageReader
from ckptd.image.verify import verify
from ckptd.image.writer import INCOMING, ImageWriter, Incoming, remove_stale
from tests.unit.image.samples import IMAGE, PAGE, manifest, small_image, task

OTHER = '20240131_235959_other_0001'


def names(spool: Path) -> list[str]:
    return sorted(path.name for path in spool.iterdir())


def use(spool: Path, body: Callable[[ImageWriter], object]) -> None:
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        body(writer)


def failure(spool: Path, body: Callable[[ImageWriter], object]) -> SpoolFailed:
    """What writing an image failed with."""
    with pytest.raises(SpoolFailed) as caught:
        use(spool, body)
    return caught.value


def test_a_published_image_is_sound_and_private(spool: Path) -> None:
    path = small_image(spool)
    assert names(spool) == [IMAGE]
    assert verify(path) == []
    assert path.stat().st_mode & 0o777 == 0o700
    assert {one.stat().st_mode & 0o777 for one in path.iterdir()} == {0o600}
    assert names(path) == ['data-0.img', 'files.img', 'manifest.json', 'memory.img', 'tasks.img', 'tree.img']


def test_digests_are_those_of_sha256sum(spool: Path) -> None:
    path = small_image(spool)
    lines = ''.join(f'{part.sha256}  {name}\n' for name, part in read_manifest(path).parts.items())
    subprocess.run(['sha256sum', '--check', '--quiet'], input=lines, text=True, cwd=path, check=True)


def test_nothing_is_seen_before_publish(spool: Path) -> None:
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        writer.part('TREE').write(task())
        writer.seal()
        assert names(spool) == [INCOMING + IMAGE]
        assert not (writer.path / 'manifest.json').exists()
    assert names(spool) == []


def test_a_reader_never_sees_half_an_image(spool: Path) -> None:
    seen: list[list[str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if (spool / IMAGE).exists():
                seen.append(verify(spool / IMAGE))
                done.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        small_image(spool)
        done.wait(5)
    finally:
        done.set()
        watcher.join()
    assert seen == [[]]


def test_an_error_of_the_body_removes_the_image(spool: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        use(spool, lambda writer: (writer.data.add([b'x']), 1 // 0))
    assert names(spool) == []


def test_an_id_is_never_a_path(spool: Path) -> None:
    for wrong in ('..', '../x', 'x/y', '', IMAGE.upper(), IMAGE + '\n'):
        with pytest.raises(ValueError, match='not an image id'):
            ImageWriter(Incoming(spool, wrong))


@pytest.mark.parametrize('content', [False, True])
def test_an_image_is_never_replaced(spool: Path, content: bool) -> None:
    (spool / IMAGE).mkdir()
    if content:
        (spool / IMAGE / 'file').touch()
    with pytest.raises(SpoolFailed) as caught:
        small_image(spool)
    assert caught.value.errno == errno.EEXIST
    assert names(spool) == [IMAGE]
    assert names(spool / IMAGE) == (['file'] if content else [])


# ---------------------------------------------------------------- data

def test_reserved_extents_are_whole_pages_apart(spool: Path) -> None:
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        data = writer.data
        extents = [data.reserve(1), data.reserve(PAGE), data.add([b'abc', b'', bytearray(b'd')]), data.reserve(0),
                   data.reserve(2 * PAGE)]
        assert [(one.offset, one.length) for one in extents] == [
            (0, 1), (PAGE, PAGE), (2 * PAGE, 4), (3 * PAGE, 0), (3 * PAGE, 2 * PAGE)]
        os.pwrite(data.fileno(), b'z' * PAGE, extents[1].offset)
        writer.publish(manifest())
    with ImageReader(spool / IMAGE) as reader:
        assert [b''.join(reader.read_extent(one)) for one in extents] == [
            b'\0', b'z' * PAGE, b'abcd', b'', bytes(2 * PAGE)]
    assert (spool / IMAGE / 'data-0.img').stat().st_size == 5 * PAGE


def test_threads_get_extents_of_their_own(tmp_path: Path) -> None:
    data = DataWriter(tmp_path, 0)
    found: dict[int, r.Extent] = {}

    def write(number: int) -> None:
        for _ in range(50):
            extent = data.reserve(PAGE + number)
            data.pwrite(bytes([number]) * extent.length, extent.offset)
            found[extent.offset] = extent
            extent = data.add([bytes([number])] * 3)
            found[extent.offset] = extent

    threads = [threading.Thread(target=write, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data.finish()
    assert len(found) == 400
    content = data.path.read_bytes()
    assert all(len(set(content[one.offset:one.offset + one.length])) == 1 for one in found.values())
    data.close()


def test_several_data_parts(spool: Path) -> None:
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        assert [writer.data.part, writer.new_data().part, writer.new_data().part] == [0, 1, 2]
        writer.new_data().add([b'three'])
        done = writer.publish(manifest())
    assert [done.parts[f'data-{part}.img'].size for part in range(4)] == [0, 0, 0, PAGE]


def test_page_runs_are_cut_into_records() -> None:
    runs = [r.PageRun(2 * PAGE * at, 1, 0, PAGE * at) for at in range(RUNS_PER_RECORD + 1)]
    made = list(page_runs(r.OF_MM, 3, runs))
    assert [len(one.runs) for one in made] == [RUNS_PER_RECORD, 1]
    assert [one.owner for one in made] == [3, 3]
    assert list(page_runs(r.OF_MM, 3, [])) == []


# ---------------------------------------------------------------- failing disks

@pytest.mark.needs('root')
def test_a_full_disk_while_data_is_written(tmpfs: Path) -> None:
    error = failure(tmpfs, lambda writer: [writer.data.add([bytes(PAGE)]) for _ in range(1000)])
    assert_full(error, tmpfs, 'data-0.img')


@pytest.mark.needs('root')
def test_a_full_disk_while_records_are_written(tmpfs: Path) -> None:
    large = r.SavedFile(1, 'x', 0, 0, 0, 0, 0, 0, '', bytes(60_000))
    error = failure(tmpfs, lambda writer: [writer.part('FILE').write(large) for _ in range(100)])
    assert_full(error, tmpfs, 'files.img')


@pytest.mark.needs('root')
@pytest.mark.parametrize('spare', range(5))
def test_a_full_disk_while_it_is_published(tmpfs: Path, spare: int) -> None:
    """Four record files and the manifest want a page each: whichever has none left says so."""
    free = os.statvfs(tmpfs).f_bavail * PAGE

    def body(writer: ImageWriter) -> None:
        writer.data.add([bytes(free - spare * PAGE)])
        writer.part('TREE').write(task())
        writer.publish(manifest())

    assert_full(failure(tmpfs, body), tmpfs)


def assert_full(error: SpoolFailed, spool: Path, name: str = '') -> None:
    assert error.errno == errno.ENOSPC
    assert error.resource.startswith(f'{spool}/{INCOMING}{IMAGE}/{name}')
    assert error.resource in error.message
    assert 'free space' in error.hint
    assert names(spool) == []


@pytest.mark.needs('root')
def test_a_read_only_spool(tmpfs: Path) -> None:
    subprocess.run(['mount', '-o', 'remount,ro', tmpfs], check=True)
    with pytest.raises(SpoolFailed) as caught:
        ImageWriter(Incoming(tmpfs, IMAGE))
    assert caught.value.errno == errno.EROFS
    assert 'read-write' in caught.value.hint
    assert names(tmpfs) == []


def test_no_spool(tmp_path: Path) -> None:
    with pytest.raises(SpoolFailed) as caught:
        ImageWriter(Incoming(tmp_path / 'gone', IMAGE))
    assert caught.value.errno == errno.ENOENT
    assert 'vanished' in caught.value.hint


@pytest.mark.parametrize('moment', ['records', 'publish'])
def test_a_spool_that_vanishes(spool: Path, tmp_path: Path, moment: str) -> None:
    def body(writer: ImageWriter) -> None:
        if moment == 'publish':
            writer.seal()
        spool.rename(tmp_path / 'elsewhere')
        writer.part('TREE').write(task())
        writer.publish(manifest())

    assert failure(spool, body).errno == errno.ENOENT
    assert names(tmp_path / 'elsewhere') == []      # not left there either


def test_a_file_size_limit(spool: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * PAGE, limits[1]))
    try:
        error = failure(spool, lambda writer: writer.data.add([bytes(9 * PAGE)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.errno == errno.EFBIG
    assert names(spool) == []


# ---------------------------------------------------------------- stale entries

def killed_writer(spool: Path, image: str, *, seal: bool) -> None:
    """An image whose writer died by SIGKILL."""
    child = os.fork()
    if child == 0:
        writer = ImageWriter(Incoming(spool, image))
        writer.data.add([b'x'])
        if seal:
            writer.seal()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize('seal', [False, True])
def test_what_a_dead_writer_left_is_removed(spool: Path, seal: bool) -> None:
    killed_writer(spool, OTHER, seal=seal)
    assert names(spool) == [INCOMING + OTHER]
    small_image(spool)
    assert remove_stale(spool) == [OTHER]
    assert names(spool) == [IMAGE]
    assert remove_stale(spool) == []


def test_what_is_removed_by_another_meanwhile_is_no_failure(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_writer(spool, OTHER, seal=True)
    inner = shutil.rmtree

    def too_late(path: Path) -> None:
        inner(path)
        inner(path)

    monkeypatch.setattr(shutil, 'rmtree', too_late)
    assert remove_stale(spool) == []
    assert names(spool) == []


def test_a_live_writer_keeps_its_entry(spool: Path) -> None:
    killed_writer(spool, OTHER, seal=False)
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        assert remove_stale(spool) == [OTHER]
        assert names(spool) == [INCOMING + IMAGE]
        writer.publish(manifest())
    assert names(spool) == [IMAGE]


def test_a_lock_of_a_published_image_is_free(spool: Path) -> None:
    path = small_image(spool)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def test_two_writers_of_one_name(spool: Path) -> None:
    with ImageWriter(Incoming(spool, IMAGE)) as writer:
        with pytest.raises(SpoolFailed) as caught:
            ImageWriter(Incoming(spool, IMAGE))
        assert caught.value.errno == errno.EEXIST
        writer.publish(manifest())
    assert names(spool) == [IMAGE]


def test_stale_entries_of_other_kinds(spool: Path, tmp_path: Path) -> None:
    """A file or a link of that name is nothing that a writer made; what a link points to stays."""
    (tmp_path / 'precious').mkdir()
    (spool / f'{INCOMING}link').symlink_to(tmp_path / 'precious')
    (spool / f'{INCOMING}file').touch()
    assert remove_stale(spool) == []
    assert (tmp_path / 'precious').exists()


def test_no_spool_to_clean(tmp_path: Path) -> None:
    with pytest.raises(SpoolFailed):
        remove_stale(tmp_path / 'gone')

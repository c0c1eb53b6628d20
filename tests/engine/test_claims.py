# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an ordinary user's image claims of files: owners, paths, signals, leases. A restart gives the user no more than
the user has, whatever the worker may do."""

import dataclasses
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.engine.messages import Caller
from ckptd.errors import Refusal
from ckptd.image import records as r
from ckptd.image.grammar import Struct
from ckptd.kinds.registry import BY_TAG
from tests.engine.driver import ORDINARY_UID, DirectWorker, Place, place_of
from tests.engine.test_obstacles import checked, found, importer
from tests.engine.test_owners import end
from tests.lib import settled
from tests.lib.altered import alter, rewrite

__all__ = ['importer']      # a fixture: an ordinary user with a process that asks

pytestmark = pytest.mark.needs('root', 'ptrace')

PYTHON = '/usr/bin/python3'     # the interpreter of the checkout may be where nobody else can read it
PRELUDE = """
import fcntl, mmap, os, signal, struct, time
def done():
    os.dup2(os.open('/dev/null', os.O_RDWR), 1)
    while True: time.sleep(1000)
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).make()


@pytest.fixture
def home() -> Iterator[Path]:
    """The user's own directory."""
    with place_of(ORDINARY_UID) as path:
        yield path


Image = Callable[..., Path]


@pytest.fixture
def image_of(place: Place, home: Path, importer: Caller) -> Iterator[Image]:
    """image_of(program): the image of a process of the user's that has run those lines of Python; it is dead. Further
    arguments: fields of the request."""
    running: list[subprocess.Popen[bytes]] = []

    def make(program: str, **more: object) -> Path:
        process = subprocess.Popen(
            [PYTHON, '-I', '-c', f'{PRELUDE}\n{program}\ndone()'], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=home, start_new_session=True, user=ORDINARY_UID, group=ORDINARY_UID,
            extra_groups=[ORDINARY_UID])
        running.append(process)
        assert process.stdout is not None
        process.stdout.read()       # its end: all is prepared
        image = place.checkpoint(process.pid, after='kill', caller=importer, **more)
        process.wait()
        settled.reap_orphans()
        return image
    yield make
    for one in running:
        if one.stdout is not None:
            one.stdout.close()
        if one.poll() is None:
            one.kill()
            one.wait()


def claim(image: Path, tag: str, change: Callable[[Any], Struct] = lambda record: record, **fields: object) -> None:
    """Change what the kind `tag` wrote of its files, and other fields of their records."""
    def altered(saved: r.OpenFile) -> r.OpenFile:
        if saved.kind != tag:
            return saved
        record = change(BY_TAG[tag].record.decode(saved.data))
        return dataclasses.replace(saved, data=record.encode(), **fields)  # type: ignore[arg-type]
    rewrite(image, r.OpenFile, altered)


def restored(place: Place, image: Path, caller: Caller, **more: object) -> int:
    with DirectWorker() as worker:
        return int(worker.run(place.request(0, target='', operation='restore', image=image.name, caller=caller,
                                            **more))['root'])


def warned(rows: list[Refusal], word: str) -> Refusal:
    [row] = [row for row in rows if word in row.reason]
    assert (row.severity, bool(row.hint)) == ('warning', True)
    return row


def refused(place: Place, image: Path, caller: Caller, **more: object) -> Refusal:
    """The one thing that is in the way, by a dry run and by a restore alike."""
    [row] = [row for row in checked(place, image, caller=caller, **more) if row.severity == 'refusal']
    assert row.hint
    with DirectWorker() as worker, pytest.raises(Exception, match='') as caught:
        worker.run(place.request(0, target='', operation='restore', image=image.name, caller=caller, **more))
    assert [one for one in getattr(caught.value, 'refusals', ()) if one.severity == 'refusal'] == [row]
    assert not place.freezes
    return row


# ---------------------------------------------------------------- owners

FILES = """
os.mkfifo('fifo'); os.open('fifo', os.O_RDWR); os.unlink('fifo')
gone = os.open('gone', os.O_RDWR | os.O_CREAT, 0o600); os.write(gone, b'#!/bin/sh'); os.unlink('gone')
os.pipe()
plain = os.memfd_create('plain'); os.write(plain, b'x')
mapped = os.memfd_create('mapped'); os.ftruncate(mapped, 4096); keep = mmap.mmap(mapped, 4096); keep[0] = 1
"""


def files_without_a_name(pid: int) -> list[os.stat_result]:
    found = [os.stat(path) for path in Path(f'/proc/{pid}/fd').iterdir()]  # noqa: PTH116
    return [of for of in found if not stat.S_ISCHR(of.st_mode)]


def test_files_are_not_given_to_somebody_else(place: Place, image_of: Image, importer: Caller) -> None:
    """A user's image says that they are root's programs with set-user-ID; by what the user may do they are not."""
    image = image_of(FILES)
    for tag in ('fifo', 'regular', 'memfd'):
        claim(image, tag, lambda one: dataclasses.replace(one, uid=0, gid=0, mode=stat.S_IFMT(one.mode) | 0o6755),
              mode=stat.S_IFIFO | 0o6755)
    claim(image, 'pipe', lambda one: dataclasses.replace(one, uid=0, gid=0), mode=stat.S_IFIFO | 0o6755)
    alter(image, r.SharedMemory, uid=0, gid=0, mode=stat.S_IFREG | 0o6755)
    rows = found(place, image, caller=importer)
    for name in ('fifo belonged', 'gone belonged', 'pipe:[', 'memfd plain', 'memfd mapped'):
        assert f'uid {ORDINARY_UID}' in warned(rows, name).reason
    pid = restored(place, image, importer)
    try:
        files = files_without_a_name(pid)
        assert len(files) == 7      # mmap.mmap has its own fd of the mapped one
        assert {(of.st_uid, of.st_gid, stat.S_IMODE(of.st_mode)) for of in files} == {
            (ORDINARY_UID, ORDINARY_UID, 0o755)}
    finally:
        end(pid)


@pytest.mark.parametrize('saved', [True, False], ids=['put back', 'cut back'])
def test_a_rollback_writes_as_the_user_does(place: Place, home: Path, image_of: Image, importer: Caller, saved: bool
                                            ) -> None:
    """Whoever may write root's program and is not root takes its set-user-ID away by that."""
    tool = home / 'tool'
    tool.write_bytes(b'#!/bin/sh')
    tool.chmod(0o4777)
    image = image_of("file = os.open('tool', os.O_RDWR)", save_files=saved)
    with tool.open('ab') as file:
        file.write(b' and more')
    tool.chmod(0o4777)
    end(restored(place, image, importer, changed_files='rollback'))
    assert tool.read_bytes() == b'#!/bin/sh'
    assert (tool.stat().st_uid, stat.S_IMODE(tool.stat().st_mode)) == (0, 0o777)


def test_files_come_back_as_the_users_own(place: Place, image_of: Image, importer: Caller) -> None:
    """Nothing is lost of what the user may give: no warning, and set-user-ID for the user stays."""
    image = image_of(f'{FILES}\nos.fchmod(gone, 0o4700)')
    assert found(place, image, caller=importer) == []
    pid = restored(place, image, importer)
    try:
        assert sorted(stat.S_IMODE(of.st_mode) for of in files_without_a_name(pid)) == [
            0o600, 0o600, 0o644, 0o777, 0o777, 0o777, 0o4700]
        assert {of.st_uid for of in files_without_a_name(pid)} == {ORDINARY_UID}
    finally:
        end(pid)

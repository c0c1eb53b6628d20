# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every victim is checkpointed and goes on: unchanged, unharmed, with an image that says what other tools say."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import PermissionDenied, Refused
from ckptd.image.reader import ImageReader
from ckptd.image.verify import verify
from tests.lib.shown import missing
from tests.lib.victim import BRIEF, RESTLESS, VICTIMS, Victim, build, names
from tests.worker import views
from tests.worker.driver import ORDINARY_UID, Place, as_user, place_of
from tests.worker.unharmed import changes, look

pytestmark = pytest.mark.needs('ptrace', 'gcc')

# its calls wait with another signal mask than the one they put back, and to gdb they answer EINTR
ELSEWHERE = {'never_restarted'}
# gdb lets what SIGTSTP stopped run, attaches to no zombie, and believes the memory of a process that shares another's
# when that names the other's threads; it opens mapped files, which one that watches them reads about
DISTURBED_BY_GDB = {'stopped', 'tree', 'headless', 'sharing', 'inotify'}
# of a deleted file that is mapped only root can read the content: proc(5), /proc/PID/map_files
REFUSED_TO_USERS = dict.fromkeys(('linked_map', 'shared'), 'is deleted and its content cannot be read')
# and only root finds files by their handles
REFUSED_TO_USERS['fanotify'] = 'a fanotify mark is on inode .*, whose path is not known'
REFUSED_TO_USERS['inotify'] = 'of an inotify instance is on inode .*, whose path is not known'
# and only root reads filters
REFUSED_TO_USERS['seccomp'] = 'runs under seccomp'
READERS = (views.of_ps, views.of_prlimit, views.of_psutil, views.of_memory, views.of_shared_memory)


def dump_and_go_on(running: Victim, place: Place, *, freeze: str, forked: bool = False) -> Path:
    """Checkpoint a victim. It is as it was, and the image is sound."""
    before = look(running)
    image = place.checkpoint(running.pid, forked=forked, freeze=freeze)
    assert changes(before, look(running), brief=running.name in BRIEF) == []
    assert verify(image) == []
    return image


@pytest.mark.needs('root')
@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
@pytest.mark.parametrize('name', names())
def test_as_root(victim: Callable[..., Victim], place: Place, name: str, freeze: str) -> None:
    running = victim(name)
    image = dump_and_go_on(running, place, freeze=freeze)
    with ImageReader(image) as reader:
        assert reader.manifest.freeze_mode == {'auto': 'cgroup'}.get(freeze, freeze)
        assert missing(name, reader) == set()
    running.finish()


@pytest.mark.parametrize('name', names())
def test_as_an_ordinary_user(name: str) -> None:
    uid = os.geteuid() or ORDINARY_UID
    program = build(name)

    def work() -> None:
        place = Place(Path.cwd()).make()
        with Victim(name, directory=place.path / 'victim') as running:
            if name in REFUSED_TO_USERS:
                with pytest.raises((PermissionDenied, Refused), match=REFUSED_TO_USERS[name]):
                    dump_and_go_on(running, place, freeze='ptrace', forked=True)
                running.finish()
                return
            image = dump_and_go_on(running, place, freeze='ptrace', forked=True)
            with ImageReader(image) as reader:
                assert reader.manifest.owner_uid == uid
            running.finish()

    with place_of(uid) as home:
        if not readable_by(uid, program):
            pytest.skip(f'uid {uid} cannot read {VICTIMS}')
        as_user(uid, home, work)


def readable_by(uid: int, path: Path) -> bool:
    if uid == os.geteuid():
        return True
    return bool(path.stat().st_mode & 0o004) and all(at.stat().st_mode & 0o001 for at in path.parents)


@pytest.mark.needs('root', 'ps')
@pytest.mark.parametrize('name', sorted(set(names()) - RESTLESS - BRIEF - ELSEWHERE))
def test_image_against_other_tools(victim: Callable[..., Victim], place: Place, name: str) -> None:
    running = victim(name)
    with ImageReader(place.checkpoint(running.pid)) as reader:
        assert [line for view in READERS for line in view(reader)] == []
    running.finish()


@pytest.mark.needs('root', 'gdb')
@pytest.mark.parametrize('name', sorted(set(names()) - RESTLESS - BRIEF - ELSEWHERE - DISTURBED_BY_GDB))
def test_registers_against_gdb(victim: Callable[..., Victim], place: Place, name: str) -> None:
    running = victim(name)
    with ImageReader(place.checkpoint(running.pid)) as reader:
        assert list(views.of_gdb(reader, place.path)) == []
    running.finish()


@pytest.mark.needs('root')
@pytest.mark.parametrize('freeze', ['auto', 'ptrace'])
@pytest.mark.parametrize('name', ['interrupted', 'registers', 'signals', 'threads'])
def test_many_in_a_row(victim: Callable[..., Victim], place: Place, name: str, freeze: str) -> None:
    running = victim(name)
    images = [place.checkpoint(running.pid, freeze=freeze) for _ in range(5)]
    assert len(set(images)) == 5
    running.finish()

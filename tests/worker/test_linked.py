# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deleted files that have another name: a restart finds the same file, and no name that a checkpoint gave stays behind.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.errors import CkptError, Refused
from ckptd.image.manifest import read_manifest
from ckptd.journal import Journal, recover
from tests.cli.conftest import Ctl
from tests.lib import settled
from tests.lib.altered import read_part, write_part
from tests.lib.bus import Daemon
from tests.lib.victim import Victim
from tests.programs.conftest import await_that
from tests.worker.driver import ORDINARY_UID, DirectWorker, Place, as_user, place_of
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]


def names(victim: Victim) -> list[str]:
    """The names that checkpoints have given, in the directories of the victim."""
    return sorted(path.name.split('.ckptd-')[0] for path in victim.directory.rglob('.*.ckptd-*'))


def links(victim: Victim) -> tuple[int, ...]:
    return tuple((victim.directory / 'elsewhere' / name).stat().st_nlink for name in ('other', 'another'))


def test_a_restart_takes_the_names_away(generation: Callable[..., Generation]) -> None:
    tree = generation('linked')
    inode = (tree.victim.directory / 'elsewhere/other').stat().st_ino
    image = tree.kill()
    assert names(tree.victim) == ['.first', '.first']
    assert read_manifest(image).names == 2
    tree.restore(image)
    assert names(tree.victim) == []
    assert links(tree.victim) == (1, 1)
    found = {os.stat(f'/proc/{tree.victim.pid}/fd/{fd}').st_ino for fd in (3, 4)}  # noqa: PTH116
    assert found >= {inode}
    tree.finish()


def test_mapped_files_have_their_names_taken_away_too(generation: Callable[..., Generation]) -> None:
    tree = generation('linked_map')
    image = tree.kill()
    assert names(tree.victim) == ['.closed', '.open']
    tree.restore(image)
    assert names(tree.victim) == []
    tree.finish()
    with pytest.raises(Refused) as refused:
        tree.restore(image)
    gone = {row.reason.rpartition('/')[2].partition('.ckptd-')[0] for row in refused.value.refusals}
    assert gone == {'.open', '.closed'}
    assert {row.resource.split()[0] for row in refused.value.refusals} == {'fd', 'vma'}


def test_a_second_restart_is_refused(generation: Callable[..., Generation]) -> None:
    """It would need a copy."""
    tree = generation('linked')
    image = tree.kill()
    tree.restore(image)
    tree.finish()
    with pytest.raises(Refused, match=r'was deleted, and its name for the image, .*/[.]first[.]ckptd-\w+, is gone'):
        tree.restore(image)


def test_a_restart_that_fails_leaves_the_names(generation: Callable[..., Generation]) -> None:
    tree = generation('linked')
    image = tree.kill()
    with DirectWorker(env={'CKPTD_FAULT': 'ready=error:EIO'}) as worker, pytest.raises(CkptError):
        worker.run(tree.place.request(0, operation='restore', image=image.name))
    assert names(tree.victim) == ['.first', '.first']
    assert not (tree.victim.directory / 'first').exists()
    settled.reap_orphans()
    tree.restore(image)
    tree.finish()


def test_an_old_name_that_is_taken(generation: Callable[..., Generation]) -> None:
    tree = generation('linked')
    (tree.victim.directory / 'first').write_text('of somebody else')
    image = tree.kill()
    tree.restore(image)
    assert (tree.victim.directory / 'first').read_text() == 'of somebody else'
    (tree.victim.directory / 'first').unlink()
    # and by the name that it has now it is dumped again
    tree.restore(tree.kill())
    assert names(tree.victim) == []
    tree.finish()


@pytest.mark.parametrize('point', ['name-link', 'name-link-done', 'memory-half', 'written', 'sealed'])
@pytest.mark.parametrize('action', ['error:EIO', 'kill'])
def test_a_checkpoint_that_fails_leaves_no_name(victim: Callable[..., Victim], place: Place, point: str,
                                                action: str) -> None:
    running = victim('linked')
    with DirectWorker(env={'CKPTD_FAULT': f'{point}={action}'}) as worker, pytest.raises((CkptError, AssertionError)):
        worker.run(place.request(running.pid))
    journal = Journal(place.runtime)
    recover(journal)
    recover(journal, files=True)
    assert names(running) == []
    assert not place.freezes
    assert links(running) == (1, 1)
    running.finish()


def test_a_worker_that_dies_after_the_image_is_published(victim: Callable[..., Victim], place: Place) -> None:
    """The journal still has the names, and the image has them, too."""
    running = victim('linked')
    with (DirectWorker(env={'CKPTD_FAULT': 'name-kept=kill'}) as worker,
          pytest.raises(AssertionError, match='the worker died')):
        worker.run(place.request(running.pid))
    journal = Journal(place.runtime)
    assert place.freezes
    recover(journal)
    recover(journal, files=True)
    assert names(running) == ['.first', '.first']
    assert not place.freezes
    running.finish()


def test_a_directory_that_is_gone(victim: Callable[..., Victim], place: Place) -> None:
    running = victim('linked')
    (running.directory / 'directory').rmdir()
    with pytest.raises(CkptError, match='for the image: its directory is gone'):
        place.checkpoint(running.pid)
    assert names(running) == []


def test_of_a_user(tmp_path: Path) -> None:
    """By the user's own rights, and refused where these are not enough."""
    def work() -> None:
        place = Place(Path.cwd()).make()
        with Victim('linked', directory=place.path / 'victim') as running:
            place.checkpoint(running.pid, freeze='ptrace', forked=True)
            assert names(running) == ['.first', '.first']
            running.directory.chmod(0o555)
            with pytest.raises(CkptError, match='may not be written'):
                place.checkpoint(running.pid, freeze='ptrace', forked=True)
            running.directory.chmod(0o755)
            running.finish()

    with place_of(ORDINARY_UID) as home:
        as_user(ORDINARY_UID, home, work)


def test_an_imported_image_names_no_files_of_ours(generation: Callable[..., Generation]) -> None:
    tree = generation('linked')
    image = tree.kill()
    write_part(image, 'TREE', read_part(image, 'TREE'), imported=True)
    with pytest.raises(Refused, match='the image was imported, and needs a deleted file'):
        tree.restore(image)


@pytest.mark.needs('dbus', 'cgroup2')
def test_the_removal_of_an_image_takes_its_names_away(daemon: Daemon, victim: Callable[..., Victim]) -> None:
    running = victim('linked')
    ctl = Ctl('--address', daemon.address)
    done = ctl('checkpoint', str(running.pid), '--json')
    assert done.status == 0, done.err
    assert names(running) == ['.first', '.first']
    assert ctl('remove', done.json['image']).status == 0
    assert names(running) == []
    assert links(running) == (1, 1)
    running.finish()


@pytest.mark.needs('dbus', 'cgroup2')
@pytest.mark.parametrize('point', ['', 'sealed=error:EIO', 'memory-half=kill'])
def test_the_tree_of_a_user_by_a_broker(start_daemon: Callable[..., Daemon], point: str) -> None:
    """A worker of the user makes the name, and the broker of root writes it down."""
    with place_of(ORDINARY_UID) as home:
        ctl = Ctl('--address', start_daemon(env={'CKPTD_FAULT': point} if point else {}).address)
        script = ('exec 3<>first; mkdir elsewhere; ln first elsewhere/other; rm first; echo; exec >/dev/null; '
                  'exec sleep 1000')
        with subprocess.Popen(['/bin/sh', '-c', script], cwd=home,
                              user=ORDINARY_UID, group=ORDINARY_UID, extra_groups=[], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as sleeper:
            assert sleeper.stdout is not None
            sleeper.stdout.readline()
            await_that('sleep runs', lambda: Path(f'/proc/{sleeper.pid}/comm').read_text() == 'sleep\n')
            try:
                done = ctl('checkpoint', str(sleeper.pid), '--json')
                assert (done.status == 0) == (not point), done.out + done.err
                assert 'Refused' not in done.out
                if not point:
                    [name] = home.glob('.first.ckptd-*')
                    inode = (home / 'elsewhere/other').stat().st_ino
                    assert (name.stat().st_uid, name.stat().st_ino) == (ORDINARY_UID, inode)
                    assert ctl('remove', done.json['image']).status == 0
                await_that('no name is left', lambda: [path.name for path in home.iterdir()] == ['elsewhere'])
            finally:
                sleeper.kill()

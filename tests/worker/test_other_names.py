# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deleted files whose other name is found: each is one file after a restart, and no name is made for the image."""

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import Refused
from ckptd.image.manifest import read_manifest
from ckptd.image.records import Backing
from tests.lib.altered import read_part, rewrite
from tests.lib.victim import Victim
from tests.worker.driver import DirectWorker
from tests.worker.test_linked import names
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

LOCK = """
import multiprocessing
import sys

from victim import ready, wait_for_go

context = multiprocessing.get_context('spawn')


def attempt(lock):
    sys.exit(0 if lock.acquire(block=False) else 3)


def exit_status_of_child(lock):
    child = context.Process(target=attempt, args=(lock,))
    child.start()
    child.join()
    return child.exitcode


if __name__ == '__main__':
    lock = context.Lock()
    ready()
    wait_for_go()
    with lock:
        assert exit_status_of_child(lock) == 3, 'the child has another lock'
    assert exit_status_of_child(lock) == 0
"""


@pytest.fixture
def semaphores(generation: Callable[..., Generation]) -> Iterator[Generation]:
    tree = generation('named_semaphores')
    yield tree
    for path in paths(tree.victim):
        path.unlink()


def paths(victim: Victim) -> list[Path]:
    return sorted(Path('/dev/shm').glob(f'sem.ckptd-victim-{victim.pid}-*'))


def mapped(victim: Victim) -> list[os.stat_result]:
    """What the semaphores are that it maps: the one without another user, the creator's and the opener's."""
    found = []
    for path in Path(f'/proc/{victim.pid}/map_files').iterdir():
        with suppress(FileNotFoundError):
            if str(path.readlink()).startswith('/dev/shm/'):
                found.append(path.stat())
    return found


def warnings(tree: Generation, image: Path) -> set[str]:
    """Those of a restart."""
    with DirectWorker() as worker:
        result = worker.run(tree.place.request(0, operation='restore', image=image.name))
    return {row['reason'] for row in result['warnings']}


def test_a_lock_that_its_creator_alone_maps(generation: Callable[..., Generation], tmp_path: Path) -> None:
    """A child that opens it afterwards excludes the parent."""
    program = tmp_path / 'lock.py'
    program.write_text(LOCK)
    tree = generation('lock', program=program)
    image = tree.kill()
    assert read_manifest(image).names == 0
    tree.restore(image)
    tree.finish()


def test_an_image_is_restored_any_number_of_times(semaphores: Generation) -> None:
    image = semaphores.kill()
    assert read_manifest(image).names == 0
    for _ in range(2):
        semaphores.restore(image)
        assert len(mapped(semaphores.victim)) == 3
        assert len({at.st_ino for at in mapped(semaphores.victim)}) == 2
        assert {at.st_ino for at in mapped(semaphores.victim)} == {path.stat().st_ino for path in
                                                                   paths(semaphores.victim)}
        semaphores.kill()


@pytest.mark.parametrize('replaced', [False, True])
def test_semaphores_that_are_gone_are_still_one(semaphores: Generation, replaced: bool) -> None:
    """As after a boot: their creator and those who opened them have one without a name."""
    image = semaphores.kill()
    old = paths(semaphores.victim)
    for path in old:
        path.unlink()
        if replaced:
            path.with_name('ckptd-test').write_bytes(bytes(32))
            path.with_name('ckptd-test').rename(path)
    told = warnings(semaphores, image)
    for path in old:
        assert any(str(path) in reason and 'the tree gets its own' in reason for reason in told), told
    assert len(mapped(semaphores.victim)) == 3
    assert len({at.st_ino for at in mapped(semaphores.victim)}) == 2
    assert {at.st_nlink for at in mapped(semaphores.victim)} == {0}


def test_a_name_that_another_process_knows(generation: Callable[..., Generation]) -> None:
    """It is in another directory, and one file is mapped there, another one is open."""
    tree = generation('linked_map')
    elsewhere = tree.victim.directory / 'elsewhere'
    with (elsewhere / 'closed').open('rb') as closed:
        memory = mmap.mmap(closed.fileno(), 0, prot=mmap.PROT_READ)
    with memory, (elsewhere / 'open').open('rb'):
        image = tree.kill()
    assert names(tree.victim) == []
    links = {record.link for record in read_part(image, 'MEM ') if isinstance(record, Backing) and record.link}
    assert links == {str(elsewhere / name) for name in ('closed', 'open')}
    tree.restore(image)
    tree.finish()


def test_a_file_without_content_in_the_image_must_be_there(semaphores: Generation) -> None:
    image = semaphores.kill()
    rewrite(image, Backing, lambda one: replace(one, content=()) if one.link else one)
    for path in paths(semaphores.victim):
        path.unlink()
    with pytest.raises(Refused) as refused:
        semaphores.restore(image)
    assert {row.hint for row in refused.value.refusals} == {'put exactly that file back'}

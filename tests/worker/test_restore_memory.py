# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory of a restored tree beyond its content: what is shared, what is absent, what is the kernel's own."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.image.reader import ImageReader
from ckptd.image.records import PAGE, VDSO, VVAR, Backing, Vma
from tests.lib.altered import rewrite
from tests.lib.victim import session_members
from tests.worker.driver import DirectWorker
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

# pages of each process that the kernel and the C library write at a restart: rseq, the stack of signal handlers
TOUCHED = 8
HEAP = 8192 * PAGE      # of the victim `forked`


def rollup(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/smaps_rollup."""
    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()[1:]
    return {name: int(value) * 1024 for name, value, _ in (line.replace(':', '').split() for line in lines)}


def sums(root: int) -> dict[str, int]:
    """The same of all processes of a tree that was started in a session of its own."""
    found: dict[str, int] = {}
    for pid in session_members(root):
        for name, value in rollup(pid).items():
            found[name] = found.get(name, 0) + value
    return found


def test_forked_memory_is_shared_as_before(generation: Callable[..., Generation]) -> None:
    tree = generation('forked')
    root = tree.victim.pid
    before, members = sums(root), session_members(root)
    assert before['Pss_Anon'] < 2 * HEAP < before['Anonymous'], 'the victim shares nothing'
    for _ in range(2):
        tree.restore(tree.kill())
        after = sums(root)
        assert session_members(root) == members
        assert after['Pss_Anon'] <= before['Pss_Anon'] + len(members) * TOUCHED * PAGE
        assert abs(after['Anonymous'] - before['Anonymous']) <= len(members) * TOUCHED * PAGE
    tree.finish()       # each process writes every page, and looks whether another one's changed


def mapped(pid: int, name: str) -> Iterator[dict[str, int]]:
    """Rows of /proc/PID/smaps of the mappings of that name, in bytes."""
    row: dict[str, int] | None = None
    for line in Path(f'/proc/{pid}/smaps').read_text().splitlines():
        words = line.split()
        if '-' in words[0] and not words[0].endswith(':'):
            if row is not None:
                yield row
            row = {} if len(words) > 5 and words[5].endswith(name) else None
        elif row is not None and words[-1] == 'kB':
            row[words[0].rstrip(':')] = int(words[1]) * 1024
    if row is not None:
        yield row


def test_absent_pages_stay_absent(generation: Callable[..., Generation]) -> None:
    tree = generation('memory')
    before = rollup(tree.victim.pid)
    tree.restore(tree.kill())
    after = rollup(tree.victim.pid)
    assert abs(after['Anonymous'] - before['Anonymous']) <= TOUCHED * PAGE
    assert after['Locked'] == before['Locked']
    tree.finish()


def test_pages_that_may_be_dropped_are_not_written(generation: Callable[..., Generation]) -> None:
    tree = generation('droppable')
    with ImageReader(tree.kill()) as reader:
        found = [(vma, reader.memory(vma.mm_id).runs) for vma in reader.every(Vma) if 'dp' in vma.vm_flags.split()]
        assert len(found) == 3      # two of the child, one of which it has from its parent
        assert not [run for vma, runs in found for run in runs if vma.start <= run.start < vma.end]


def test_private_file_mappings_share_the_page_cache(generation: Callable[..., Generation]) -> None:
    """Pages of the file that the program did not change are not its own."""
    tree = generation('memory')
    own_before = [row['Anonymous'] for row in mapped(tree.victim.pid, '/mapped')]
    assert sum(own_before) == 4 * PAGE
    tree.restore(tree.kill())
    assert [row['Anonymous'] for row in mapped(tree.victim.pid, '/mapped')] == own_before
    tree.finish()


# ---------------------------------------------------------------- mapped files

def restored(tree: Generation, image: Path) -> list[str]:
    """What a restore warns of."""
    with DirectWorker() as worker:
        result = worker.run(tree.place.request(0, operation='restore', image=image.name))
    return [row['reason'] for row in result['warnings']]


@pytest.mark.parametrize('stranger', [False, True])
def test_a_small_file_that_was_mapped_and_is_gone(generation: Callable[..., Generation], *, stranger: bool) -> None:
    """As java's statistics, which the next java removes: the tree goes on with its own, twice, and leaves no name."""
    tree = generation('shared')
    image = tree.kill()
    with ImageReader(image) as reader:
        [kept] = [one for one in reader.every(Backing) if one.content and not one.deleted]
    path = tree.victim.directory / 'shared'
    assert kept.path == str(path)
    path.rename(path.with_name('moved'))
    if stranger:
        path.write_bytes(b'of somebody else')
    assert any(str(path) in reason and 'without a name' in reason for reason in restored(tree, image))
    restored(tree, tree.kill())
    tree.finish()
    assert not path.exists() or path.read_bytes() == b'of somebody else'


def test_a_mapped_file_that_is_there_is_the_same_one(generation: Callable[..., Generation]) -> None:
    tree = generation('shared')
    path = tree.victim.directory / 'shared'
    before = path.stat().st_ino
    warnings = restored(tree, tree.kill())
    assert not any('without a name' in reason for reason in warnings)
    maps = Path(f'/proc/{tree.victim.pid}/maps').read_text().splitlines()
    assert any(line.split()[4:] == [str(before), str(path)] for line in maps)
    tree.finish()
    assert path.read_bytes()[-8:] == (2000).to_bytes(8, 'little')       # what its child wrote at the end


# ---------------------------------------------------------------- the kernel's own

@pytest.mark.parametrize('name', ['timers', 'interpreter'])
def test_a_vdso_of_another_kernel_is_bridged(generation: Callable[..., Generation], name: str) -> None:
    """An image that says that its data was shorter: the old text jumps into that of this kernel, elsewhere."""
    tree = generation(name)
    image = tree.kill()
    with ImageReader(image) as reader:
        lowest = min(vma.start for vma in reader.every(Vma) if vma.kind == VVAR)
        text = min(vma.start for vma in reader.every(Vma) if vma.kind == VDSO)
    rewrite(image, Vma, lambda vma: dataclasses.replace(vma, start=vma.start + PAGE) if vma.start == lowest else vma)
    tree.restore(image)
    places = [line for line in Path(f'/proc/{tree.victim.pid}/maps').read_text().splitlines() if '[vdso]' in line]
    assert len(places) == 1
    assert int(places[0].split('-')[0], 16) != text, 'it was not bridged'
    tree.finish()

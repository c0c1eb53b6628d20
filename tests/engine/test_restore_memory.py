# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory of a restored tree beyond its content: what is shared, what is absent, what is the kernel's own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.image.records import PAGE
from tests.engine.driver import Place
from tests.engine.test_restore import Generation, generation
from tests.lib.victim import session_members

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

# pages of each process that the kernel and the C library write at a restart: rseq, the stack of signal handlers
TOUCHED = 8
HEAP = 8192 * PAGE      # of the victim `forked`


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path).make()


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


def test_private_file_mappings_share_the_page_cache(generation: Callable[..., Generation]) -> None:
    """Pages of the file that the program did not change are not its own."""
    tree = generation('memory')
    own_before = [row['Anonymous'] for row in mapped(tree.victim.pid, '/mapped')]
    assert sum(own_before) == 4 * PAGE
    tree.restore(tree.kill())
    assert [row['Anonymous'] for row in mapped(tree.victim.pid, '/mapped')] == own_before
    tree.finish()

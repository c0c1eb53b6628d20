# SPDX-License-Identifier: LGPL-2.1-or-later
"""Huge pages (hugetlb), which need a pool of them."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.errors import CkptError
from tests.lib.procdiff import changes_of_restart
from tests.worker.test_restore import Generation, generation

__all__ = ['generation']
pytestmark = [pytest.mark.needs('root', 'ptrace', 'gcc'), pytest.mark.timeout(120)]

POOL = Path('/proc/sys/vm/nr_hugepages')
FREE = Path('/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages')
NEEDED = 14         # 4 in each process, and 2 for each of three shared objects
PAGES = NEEDED + 2


@pytest.fixture
def pool() -> Iterator[None]:
    with POOL.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # another test may run at the same time
        before = POOL.read_text()
        try:
            POOL.write_text(str(int(before) + PAGES))
        except OSError as error:
            pytest.skip(f'huge pages cannot be reserved: {error.strerror}')
        yield
        POOL.write_text(before)


@pytest.mark.usefixtures('pool')
def test_it_comes_back(generation: Callable[..., Generation]) -> None:
    """Twice, in a process and its child."""
    tree = generation('huge_pages', 'must')
    before = tree.look()
    tree.restore(tree.kill())
    tree.restore(tree.kill(freeze='ptrace'))
    assert changes_of_restart(before, tree.look()) == []
    tree.finish()


@pytest.mark.usefixtures('pool')
def test_a_pool_that_is_too_small(generation: Callable[..., Generation]) -> None:
    tree = generation('huge_pages', 'must')
    image = tree.kill()
    deadline = time.monotonic() + 10
    while int(FREE.read_text()) < PAGES and time.monotonic() < deadline:
        os.sched_yield()
    POOL.write_text(str(NEEDED - 1))
    with pytest.raises(CkptError, match=fr'the tree needs {NEEDED} huge pages of 2048 kB, and {NEEDED - 1} are free'):
        tree.restore(image)
    POOL.write_text(str(NEEDED))
    tree.restore(image)
    tree.finish()

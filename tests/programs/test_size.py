# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is large: a thousand processes, and a gibibyte of memory that nothing can make smaller."""

from pathlib import Path

import pytest

from tests.bench.bench_dump import memory_process
from tests.bench.bench_scan import build, sleeping_tree
from tests.lib.procdiff import differences, take_picture
from tests.lib.victim import states
from tests.programs.conftest import Standalone, await_that

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'gcc'), pytest.mark.timeout(300)]


def test_a_thousand_sleeping_processes(standalone: Standalone, tmp_path: Path) -> None:
    with sleeping_tree(build(tmp_path), 1000) as root:
        await_that('all sleep', lambda: set(states(root)) == {'S'})
        before = take_picture(root)
        result = standalone.checkpoint(root, '--timeout', '2min')
        assert result['processes'] == 1000
        assert not differences(before, take_picture(root))


def test_a_gibibyte_of_random_memory(standalone: Standalone, tmp_path: Path) -> None:
    """It sums up its memory before and after."""
    with memory_process(1024, tmp_path) as memory:
        await_that('it waits', lambda: states(memory.pid) == 'S')
        before = take_picture(memory.pid)
        result = standalone.checkpoint(memory.pid)
        assert 1 << 18 <= result['pages_written'] < 1.1 * (1 << 18)
        assert not differences(before, take_picture(memory.pid))
    standalone('remove', result['image'])

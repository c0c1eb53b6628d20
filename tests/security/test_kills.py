# SPDX-License-Identifier: LGPL-2.1-or-later
"""A tenth of `make kills`, with the seed CKPTD_KILLS_SEED or any; and that what it looks for is found."""

import fcntl
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kills.rounds import Round, run
from tests.kills.stage import Stage, descendants
from tests.lib import settled
from tests.programs.conftest import await_that

pytestmark = [pytest.mark.needs('cgroup2', 'gcc'), pytest.mark.timeout(600)]


def test_a_hundred_kills(test_cgroup: Path, tmp_path: Path, record_property: 'pytest.RecordProperty') -> None:
    seed = int(os.environ.get('CKPTD_KILLS_SEED', random.randrange(10**9)))
    record_property('seed', seed)
    report = run(tmp_path, test_cgroup, seed, range(100), print)
    assert sum(report.killed.values()) == 100
    assert not report.failures, '\n'.join(report.lines())


def test_a_round_is_the_same_again() -> None:
    assert Round.of(7, 3) == Round.of(7, 3)
    assert len({Round.of(7, number) for number in range(50)}) == 50
    assert Round.of(7, 3, attempt=1).who == Round.of(7, 3).who
    assert Round.of(7, 3, attempt=1).at != Round.of(7, 3).at


# ---------------------------------------------------------------- what is found

@pytest.fixture
def stage(test_cgroup: Path, tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path, test_cgroup) as stage:
        yield stage


def test_a_tree_that_is_harmed_or_stopped(stage: Stage) -> None:
    with stage.tree(alone=True) as tree:
        assert [*tree.missing(), *tree.stops(), *stage.left_over(tree)] == []
        (tree.home / 'cgroup.freeze').write_text('1')
        await_that('it is frozen', lambda: any('is frozen' in text for text in tree.stops()))
        assert 'is frozen' in str(stage.left_over(tree))
        (tree.home / 'cgroup.freeze').write_text('0')
        os.kill(tree.root, signal.SIGSTOP)
        await_that('it is stopped', lambda: any('is in state T' in text for text in tree.stops()))
        os.kill(tree.root, signal.SIGCONT)
        await_that('it runs', lambda: not tree.stops())
        (stage.cgroup / 'cgroup.procs').write_text(str(tree.root))
        assert 'not in' in str(tree.stops())
        os.kill(descendants(tree.root)[0], signal.SIGKILL)
        await_that('half of it is dead', lambda: any('there are only' in text for text in tree.missing()))
        assert 'has ended with 0x9' in tree.check_itself()


def test_a_tree_whose_file_is_another(stage: Stage) -> None:
    with stage.tree(alone=False) as tree:
        tree.file.write_bytes(b'another')
        assert 'the file has another size' in tree.check_itself()


def test_what_is_left(stage: Stage) -> None:
    freezes = stage.daemon.runtime / 'freezes'
    with stage.tree(alone=False) as tree:
        assert stage.left_over(tree) == []
        with subprocess.Popen(['sleep', '1000']) as process:
            assert f'process {process.pid}' in str(stage.left_over(tree))
            process.kill()
        (stage.cgroup / 'ckptd-1-ab').mkdir()
        assert 'ckptd-1-ab is left' in str(stage.left_over(tree))
        settled.remove_cgroup(stage.cgroup / 'ckptd-1-ab')
        for path in (freezes / '1-ab.jsonl', stage.spool / '.kept-ab'):
            path.write_text('')
            assert f'{path.name} is left' in str(stage.left_over(tree))
            path.unlink()
        lock = os.open(freezes, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f'{freezes} is locked' in str(stage.left_over(tree))
        os.close(lock)
        assert stage.left_over(tree) == []

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two commands that a newcomer types first."""

import os
import signal
from pathlib import Path

import pytest

from ckptd.cli import demo_tree
from ckptd.cli.doctor import YAMA
from ckptd.kernel.probe import PROBES
from tests.cli.conftest import Ctl


def test_doctor_lists_every_feature_and_what_its_absence_costs() -> None:
    rows = Ctl('--address', 'unix:path=/nonexistent')('doctor', '--json').json
    by_name = {row['name']: row for row in rows}
    assert {probe.name for probe in PROBES} <= by_name.keys()
    assert all(row.keys() == {'name', 'present', 'required', 'needed_for', 'lost', 'hint', 'detail'} for row in rows)
    assert all(row['hint'] and row['lost'] for row in rows if row['present'] is False)
    assert by_name['ckptd on the bus']['present'] is False


def test_doctor_for_people() -> None:
    done = Ctl('--address', 'unix:path=/nonexistent')('doctor')
    assert (done.status == 0) == ('Trees can be checkpointed.' in done.out)
    assert 'to get it: ' in done.out


def test_the_feature_that_the_demo_asks_for_exists() -> None:
    assert YAMA in {probe.name for probe in PROBES}


@pytest.mark.needs('dbus', 'ptrace')
def test_the_demo_shows_everything_and_leaves_nothing(tmp_path: Path) -> None:
    done = Ctl(env={'TMPDIR': str(tmp_path)})('demo')
    assert done.status == 0, done.out + done.err
    titles = ('Check:', 'Checkpoint:', 'Tree:', 'Statistics:', 'Verify:', 'Export:', 'Backtrace', 'Restart:')
    assert [title for title in titles if title not in done.out] == []
    assert '100%' in done.out
    assert 'exited with status 0' in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs('dbus', 'ptrace')
def test_the_demo_as_json_without_a_cgroup(tmp_path: Path) -> None:
    facts = Ctl(env={'TMPDIR': str(tmp_path)})('demo', '--json', '--freeze', 'ptrace').json
    assert facts['freeze_mode'] == 'ptrace'
    assert (facts['tasks'], facts['tree_exit_status'], facts['damages']) == (9, 0, [])
    assert len(facts['cores']) == 5
    assert all(now > then for then, now in zip(facts['counters_before'], facts['counters_after'], strict=True))


def test_the_demo_tree_checks_itself(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / demo_tree.READY)
    pid = os.fork()
    if pid == 0:
        os._exit(demo_tree.main(tmp_path))
    assert int((tmp_path / demo_tree.READY).read_text()) == pid
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(demo_tree.read_counters(tmp_path)) == len(demo_tree.SLOTS)

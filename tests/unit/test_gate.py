# SPDX-License-Identifier: LGPL-2.1-or-later
"""The gate and the settled check are tested as everything else: a check that never fails checks nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib import gate, settled


def test_unknown_requirement_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CKPTD_REQUIRE', 'root,rot')
    with pytest.raises(ValueError, match='unknown rot'):
        gate.required()


def test_all_requires_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('CKPTD_REQUIRE', 'all')
    assert gate.required() == gate.NEEDS.keys()


@pytest.mark.parametrize(('page', 'end', 'heavy'), [('README.md', 'make test', False),
                                                    ('CONTRIBUTING.md', 'make programs', True)])
def test_a_page_installs_every_package_that_a_gate_asks_for(page: str, end: str, heavy: bool) -> None:
    text = (Path(__file__).parents[2] / page).read_text()
    [line] = [line for line in text.splitlines() if line.endswith(f'&& {end}')]
    installed = set(line.partition('install -y ')[2].partition(' && ')[0].split())
    wanted = {package for need in gate.NEEDS.values() if gate.APT in need.fix and need.heavy is heavy
              for package in need.fix.partition(gate.APT)[2].partition(',')[0].split()}
    assert len(wanted) > 1
    assert wanted <= installed


@pytest.mark.parametrize('required', [True, False])
def test_missing_thing_skips_or_fails(monkeypatch: pytest.MonkeyPatch, required: bool) -> None:
    monkeypatch.setitem(gate.NEEDS, 'moon', gate.Need(lambda: 'no moon tonight', 'wait a fortnight'))
    monkeypatch.setenv('CKPTD_REQUIRE', 'moon' if required else '')
    reason, failure = gate.verdict(['moon'])
    assert reason == 'needs moon: no moon tonight. To have it: wait a fortnight'
    assert failure is required
    gate.missing.cache_clear()


def test_settled_finds_a_process_left(test_cgroup: Path | None) -> None:
    before = settled.Picture.take(test_cgroup)
    settled_grace, settled.GRACE = settled.GRACE, 0.05
    try:
        child = subprocess.Popen(['sleep', '60'])
        sentences = before.left(test_cgroup)
    finally:
        settled.GRACE = settled_grace
    child.returncode = -signal.SIGKILL      # it was killed and reaped behind subprocess's back
    assert len(sentences) == 1
    assert 'sleep 60' in sentences[0]


def test_settled_finds_an_orphan_left(test_cgroup: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, 'GRACE', 0.05)
    before = settled.Picture.take(test_cgroup)
    subprocess.run(['sh', '-c', 'sleep 60 &'], check=True)
    assert 'sleep 60' in ' '.join(before.left(test_cgroup))
    assert not before.left(test_cgroup)


def test_settled_finds_an_fd_left(test_cgroup: Path | None) -> None:
    before = settled.Picture.take(test_cgroup)
    fd = os.open('/dev/null', os.O_RDONLY)
    try:
        assert before.left(test_cgroup) == [f'fd {fd} -> /dev/null was left open']
    finally:
        os.close(fd)


@pytest.mark.needs('cgroup2')
def test_settled_finds_a_frozen_cgroup_left(test_cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settled, 'GRACE', 0.05)
    before = settled.Picture.take(test_cgroup)
    left = test_cgroup / 'left'
    left.mkdir()
    (left / 'cgroup.freeze').write_text('1')
    assert before.left(test_cgroup) == [f'cgroup {left} was left, frozen 1']
    assert not left.exists()


def test_summary_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, '-m', 'tests.lib.gate'], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[2])
    assert done.returncode in (0, 1)
    assert done.stdout

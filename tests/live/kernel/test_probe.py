# SPDX-License-Identifier: LGPL-2.1-or-later
"""The list of features: as root, as an ordinary user, and when an experiment kills or hangs its process."""

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.kernel import feature_tests, probe
from ckptd.kernel.creds import become, capget
from ckptd.kernel.prctl import prctl
from tests.lib import gate

PR_SET_DUMPABLE = 4     # <linux/prctl.h>
NOBODY = 65534


def make(test: Callable[[], str]) -> probe._Probe:
    return probe._Probe('name', test, 'needed for', 'lost', 'hint')


def answers(monkeypatch: pytest.MonkeyPatch, *tests: Callable[[], str]) -> list[tuple[bool | None, str]]:
    """(present, detail) of each of these experiments, in place of the real ones."""
    monkeypatch.setattr(probe, 'PROBES', [make(test) for test in tests])
    return [(feature.present, feature.detail) for feature in probe.probe_features()]


def fail(error: Exception) -> str:
    raise error


def test_every_feature_has_an_answer_and_its_texts() -> None:
    features = probe.probe_features()
    assert len({feature.name for feature in features}) == len(features) == len(probe.PROBES)
    for feature in features:
        assert feature.needed_for
        assert feature.lost
        assert feature.hint
        assert feature.present or feature.detail, f'{feature.name} does not say why'


def test_it_agrees_with_what_others_found() -> None:
    found = {feature.name: feature.present for feature in probe.probe_features()}
    assert found['PTRACE_SEIZE'] == (not gate.missing('ptrace'))
    assert found['cgroup.freeze'] in (None, True)
    assert bool(found['cgroup v2 writable']) == (not gate.missing('cgroup2'))
    assert found['/proc/PID/task/TID/children'] == Path('/proc/self/task', str(os.getpid()), 'children').exists()
    assert found['CAP_KILL'] == bool(capget().effective >> 5 & 1)


@pytest.mark.needs('root', 'ptrace')
def test_as_an_ordinary_user(forked: Callable[..., int], tmp_path: Path) -> None:
    out = os.open(tmp_path / 'features', os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)

    def setup() -> None:
        feature_tests.sock_diag()       # imports what an ordinary user may not be able to read
        become(NOBODY, NOBODY, [], 0)
        prctl(PR_SET_DUMPABLE, 1)       # as after execve(2)
        rows = {feature.name: [feature.present, feature.detail] for feature in probe.probe_features()}
        os.write(out, json.dumps(rows).encode())
    try:
        forked(setup)
    finally:
        os.close(out)
    rows = json.loads((tmp_path / 'features').read_text())
    assert rows.keys() == {each.name for each in probe.PROBES}
    assert all(rows[each.name][0] for each in probe.PROBES if each.required)
    assert all(rows[name][0] is False for name in rows if name.startswith('CAP_'))
    assert rows['cgroup v2 writable'][0] is False
    assert 'Permission denied' in rows['cgroup v2 writable'][1]
    assert rows['cgroup.freeze'][0] is None
    assert rows['clone3 set_tid'] == [False, 'clone3: Operation not permitted']


def test_absent_and_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers(
        monkeypatch, lambda: 'here', lambda: fail(OSError(errno.ENOSYS, 'call: Function not implemented')),
        lambda: fail(feature_tests.Unknown('cannot try')), lambda: fail(KeyError('Pid')), lambda: '') == [
            (True, 'here'), (False, 'call: Function not implemented'), (None, 'cannot try'), (None, "'Pid'"),
            (True, '')]


def test_an_experiment_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ''
    assert answers(monkeypatch, lambda: 'before', killed, killed, lambda: 'after') == [
        (True, 'before'), (None, 'the experiment was ended by SIGKILL'),
        (None, 'the experiment was ended by SIGKILL'), (True, 'after')]


def test_an_experiment_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, '_TIMEOUT', 2.0)
    monkeypatch.setattr(probe, '_GRACE', 0.0)

    def hangs() -> str:
        signal.pause()
        return ''
    assert answers(monkeypatch, hangs, lambda: 'after') == [(None, 'no answer within 2 s'), (True, 'after')]


@pytest.mark.needs('cgroup2')
def test_killed_with_a_frozen_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> str:
        with feature_tests.probe_cgroup() as group, feature_tests.TestChild() as child:
            group.attach(child.pid)
            group.freeze()
            os.kill(os.getpid(), signal.SIGKILL)
        return ''
    # the settled check sees to it that neither the cgroup nor the child is left
    assert answers(monkeypatch, killed)[0][0] is None


def test_choosing_a_pid_makes_no_process() -> None:
    before = Path(f'/proc/self/task/{os.getpid()}/children').read_text()
    with contextlib.suppress(PermissionError):
        feature_tests.set_tid()
    assert Path(f'/proc/self/task/{os.getpid()}/children').read_text() == before

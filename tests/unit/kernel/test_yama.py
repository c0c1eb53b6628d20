# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a refusal says of Yama's rule, value by value."""

from pathlib import Path

import pytest

from ckptd.kernel import yama


@pytest.mark.parametrize(('scope', 'reason', 'hint'), [
    ('0\n', 'a security module forbids it', 'journalctl'), ('1\n', 'ptrace_scope=1', 'CheckpointSelf'),
    ('2\n', 'ptrace_scope=2', 'org.ckptd1.trace-under-yama'), ('3\n', 'ptrace_scope=3', '/etc/sysctl.d')])
def test_the_rule_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, reason: str,
                           hint: str) -> None:
    (tmp_path / 'ptrace_scope').write_text(scope)
    monkeypatch.setattr(yama, 'PTRACE_SCOPE', str(tmp_path / 'ptrace_scope'))
    forbidden = yama.untraceable()
    assert reason in forbidden.reason
    assert hint in forbidden.hint
    assert ('CheckpointSelf' in forbidden.hint) == (scope == '1\n')


def test_a_kernel_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yama, 'PTRACE_SCOPE', str(tmp_path / 'none'))
    assert yama.ptrace_scope() == yama.ANYBODY

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The register state of a process of ours, which a child is asked for."""

import os
import signal
from pathlib import Path

import pytest

from ckptd.kernel.ptrace import Tracee
from ckptd.restore import xstate
from ckptd.restore.xstate import own_xstate, shortcoming
from tests.lib import settled
from tests.lib.brood import fork
from tests.programs.conftest import await_that

pytestmark = pytest.mark.needs('ptrace')


def test_what_we_have_is_enough_for_us() -> None:
    own_xstate.cache_clear()
    assert len(own_xstate()) >= 576      # the legacy area and the header, Intel SDM 1, 13.4
    assert shortcoming(own_xstate(), own_xstate()) == ''


def test_the_child_ends_when_we_are_killed(test_cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ours then, as we take orphans."""
    own_xstate.cache_clear()
    monkeypatch.setattr(xstate, 'Tracee', Killed)
    before = set(settled.children())
    pid = fork()
    if pid == 0:
        try:
            own_xstate()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def is_over() -> bool:
        settled.reap_orphans()
        return set(settled.children()) <= before

    await_that('the child has ended', is_over)


class Killed(Tracee):
    """Whoever wants to trace is killed."""

    @classmethod
    def seize(cls, *_: object, **__: object) -> Tracee:    # type: ignore[override]
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError('it is dead')

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The control: every victim passes its own check when nobody touches it, and fails it when something is wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lib.procdiff import differences, take_picture
from tests.lib.victim import BRIEF, RESTLESS, Victim, names

pytestmark = pytest.mark.needs('gcc')


@pytest.mark.parametrize('name', names())
def test_undisturbed_victim_succeeds(victim: Callable[..., Victim], name: str) -> None:
    running = victim(name, *(['4'] if name in BRIEF else []))
    before = take_picture(running.pid, moving=name in RESTLESS)
    assert not differences(before, take_picture(running.pid, moving=name in RESTLESS))
    running.finish()


def test_victim_that_was_tampered_with_fails(victim: Callable[..., Victim]) -> None:
    running = victim('files')
    with Path(f'/proc/{running.pid}/fd/500').open('rb') as same_file:
        assert same_file.read(1)
    data = running.directory / 'data'
    data.write_bytes(b'x' + data.read_bytes()[1:])
    running.go()
    assert running.process.wait(10) == 1
    assert 'file: word 0' in running.output


def test_picture_tells_a_changed_tree(victim: Callable[..., Victim]) -> None:
    running = victim('tree')
    before = take_picture(running.pid)
    os.kill(running.pid, 19)        # SIGSTOP
    os.waitpid(running.pid, os.WUNTRACED)
    found = differences(before, take_picture(running.pid))
    os.kill(running.pid, 18)        # SIGCONT
    assert [line for line in found if 'State' in line]
    running.finish()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that people have open in their terminals: used, checkpointed, killed, restored, and used again, twice."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lib import settled
from tests.lib.victim import kill_session
from tests.programs.conftest import Standalone, await_that
from tests.programs.test_terminals import Tmux, kill, settings

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'root'), pytest.mark.timeout(240), pytest.mark.heavy]


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    server = Tmux(tmp_path)
    yield server
    kill_session(server.pid)
    settled.reap_orphans()


def generations(standalone: Standalone, pid: int, use: Callable[[int], None]) -> None:
    """Use a tree while it runs, after a checkpoint, and after each of two restarts."""
    use(1)
    standalone('check', str(pid))
    standalone('checkpoint', str(pid))
    use(2)
    for number in (3, 4):
        assert standalone('restore', kill(standalone, pid))['root'] == pid
        use(number)


@pytest.mark.needs('tmux', 'htop', 'emacs')
def test_tmux_with_emacs_and_htop(tmux: Tmux, standalone: Standalone, tmp_path: Path) -> None:
    """The settings of the terminals stay, both screens are drawn by keys, and the text has what each round typed."""
    tmux.open('emacs', '-nw', '-Q', 'text')
    tmux.open('htop', '--no-color', '--delay=1000')
    tmux.shows(1, 'text')
    tmux.shows(2, 'Load average')
    before = [settings(pid) for pid in tmux.pids()]
    assert '-icanon' in before[1]
    assert '-echo' in before[2]

    def use(number: int) -> None:
        assert [settings(pid) for pid in tmux.pids()] == before
        tmux.type(1, f'round {number}', 'Enter', 'C-x', 'C-s')
        words = ''.join(f'round {one}\n' for one in range(1, number + 1))
        await_that('emacs has saved', lambda: (tmp_path / 'text').exists() and (tmp_path / 'text').read_text() == words)
        tmux.shows(1, f'round {number}')
        tmux.type(2, 'F1')
        tmux.shows(2, 'htop dev team')
        tmux.type(2, 'q')
        tmux.shows(2, 'Load average')
    generations(standalone, tmux.pid, use)
    tmux.type(1, 'C-x', 'C-c')
    tmux.type(2, 'q')
    await_that('both have ended', lambda: len(tmux.pids()) == 1)

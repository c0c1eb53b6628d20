# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that people have open on their desktops: used, checkpointed, killed, restored, and used again, twice.

`make test` leaves out those with the marker `heavy`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lib import settled
from tests.lib.victim import kill_session
from tests.programs import test_servers
from tests.programs.conftest import Standalone, await_that
from tests.programs.test_programs import Program
from tests.programs.test_terminals import Tmux, kill, settings

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'root'), pytest.mark.timeout(240)]
# of work/served, by what the gate calls the programs
SERVED = {'terminals.Ipython': ['ipython'], 'terminals.Pexpect': ['pexpect'], 'browser.Chromium': ['chromium']}
WINDOWS = {'windows.XTerm': ['xvfb', 'xdotool', 'xterm'], 'windows.Tk': ['xvfb', 'xdotool', 'tk']}


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


@pytest.mark.heavy
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


def heavy(programs: Mapping[str, Sequence[str]]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.heavy, pytest.mark.needs(*needs)])
            for name, needs in programs.items()]


@pytest.mark.needs('less')
@pytest.mark.parametrize('name', ['terminals.Terminals', *heavy(SERVED)])
def test_program_with_its_client(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    test_servers.test_server_with_its_client(program, standalone, tmp_path, name)


@pytest.mark.parametrize('name', heavy(WINDOWS))
def test_window(program: Program, standalone: Standalone, tmp_path: Path, name: str) -> None:
    """A program, the X server that shows it, and who types into it."""
    try:
        test_servers.test_server_with_its_client(program, standalone, tmp_path, name)
    finally:
        # of an X server that was killed
        number = (tmp_path / 'display').read_text().removeprefix(':')
        for path in (Path(f'/tmp/.X11-unix/X{number}'), Path(f'/tmp/.X{number}-lock')):
            path.unlink(missing_ok=True)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that make terminals, or use them: checkpointed, killed, restarted, and used afterwards."""

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_restore import Screen
from tests.lib import settled
from tests.lib.victim import kill_session, session_members
from tests.programs.conftest import Standalone, await_that
from tests.programs.test_programs import Program

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'root'), pytest.mark.timeout(240)]


def environment(home: Path) -> dict[str, str]:
    return {'PATH': os.environ['PATH'], 'HOME': str(home), 'TERM': 'xterm', 'PS1': '$ ', 'LC_ALL': 'C.UTF-8'}


def kill(standalone: Standalone, pid: int) -> str:
    """The image of a tree, which is dead and reaped then."""
    members = session_members(pid)
    image: str = standalone.checkpoint(pid, '--kill')['image']

    def gone() -> bool:
        settled.reap_orphans()
        return not any(Path(f'/proc/{member}').exists() for member in members)
    await_that('the tree is gone', gone)
    return image


def settings(pid: int) -> str:
    """The settings of the terminal of a process, as stty(1) tells them."""
    return subprocess.run(['stty', '-a', '-F', f'/proc/{pid}/fd/0'], capture_output=True, text=True, check=True).stdout


class Tmux:
    """A server of tmux(1) without a client."""

    def __init__(self, directory: Path) -> None:
        self._command = ['tmux', '-f', '/dev/null', '-S', str(directory / 'server')]
        self._directory = directory
        self('new-session', '-d', '-x', '90', '-y', '30', 'bash', '--norc')
        self.pid = int(self('display', '-p', '#{pid}'))

    def __call__(self, *args: str) -> str:
        done = subprocess.run([*self._command, *args], capture_output=True, text=True, check=False, timeout=60,
                              cwd=self._directory, env=environment(self._directory))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def open(self, *command: str) -> None:
        self('new-window', *command)

    def shows(self, window: int, words: str) -> None:
        await_that(words, lambda: words in self.screen(window))

    def screen(self, window: int) -> str:
        return self('capture-pane', '-p', '-e', '-t', f':{window}')

    def type(self, window: int, *keys: str) -> None:
        self('send-keys', '-t', f':{window}', *keys)

    def pids(self) -> list[int]:
        """The first process of each window."""
        return [int(line) for line in self('list-panes', '-s', '-F', '#{pane_pid}').split()]

    def look(self) -> list[tuple[str, str]]:
        return [(self.screen(window), settings(pid)) for window, pid in enumerate(self.pids())]


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    server = Tmux(tmp_path)
    yield server
    kill_session(server.pid)
    settled.reap_orphans()


@pytest.mark.needs('tmux', 'less', 'vim')
def test_tmux(tmux: Tmux, standalone: Standalone, tmp_path: Path) -> None:
    """A shell, an editor and a pager are as they were, twice, and they take keys."""
    (tmp_path / 'text').write_text(''.join(f'row {number}\n' for number in range(1, 301)))
    tmux.open('vim', '-u', 'NONE', 'text')
    tmux.open('less', 'text')
    tmux.type(0, 'echo $((6*7))', 'Enter')
    for window, words in enumerate(('42\n', 'row 29', 'row 29')):
        tmux.shows(window, words)
    before = tmux.look()
    assert '-icanon' in before[1][1]
    assert '-echo' in before[2][1]
    for generation in range(2):
        image = kill(standalone, tmux.pid)
        assert standalone('restore', image)['root'] == tmux.pid
        assert tmux.look() == before, generation
    tmux.type(0, 'echo $((6*8))', 'Enter')
    tmux.type(1, 'G')
    tmux.type(2, 'G')
    for window, words in enumerate(('48\n', 'row 300', 'row 300')):
        tmux.shows(window, words)
    tmux.type(1, ':s/row/line/', 'Enter', ':wq', 'Enter')
    await_that('vim has written', lambda: (tmp_path / 'text').read_text().endswith('line 300\n'))
    tmux.type(0, 'C-c')
    tmux('kill-server')
    await_that('the server has ended', lambda: not Path(f'/proc/{tmux.pid}').exists() or settled.is_zombie(tmux.pid))


@pytest.mark.needs('screen')
def test_screen(standalone: Standalone, tmp_path: Path) -> None:
    """A session of screen(1) without a client takes commands, and its shell has its terminal."""
    sockets = tmp_path / 'sockets'
    sockets.mkdir(mode=0o700)
    command = ['screen', '-S', 'test', '-s', 'sh', '-c', '/dev/null']
    env = {**environment(tmp_path), 'SCREENDIR': str(sockets)}

    def do(*args: str) -> None:
        subprocess.run([*command, *args], env=env, cwd=tmp_path, check=True, timeout=60)

    do('-d', '-m', 'sh')
    [socket] = await_that('the server is there', lambda: [*sockets.iterdir()])
    pid = int(socket.name.partition('.')[0])
    try:
        do('-X', 'stuff', 'echo $((6*7)) > first; tty > name\n')
        await_that('the shell has answered', lambda: (tmp_path / 'name').exists() and (tmp_path / 'name').read_text())
        for number in range(2):
            image = kill(standalone, pid)
            assert standalone('restore', image)['root'] == pid
            do('-X', 'stuff', f'echo $((6*8)) > again; stty size > size.{number}\n')
            await_that('the shell has answered', lambda name=f'size.{number}': (tmp_path / name).exists())
        assert (tmp_path / 'again').read_text() == '48\n'
        do('-X', 'quit')
        await_that('the server has ended', lambda: not Path(f'/proc/{pid}').exists() or settled.is_zombie(pid))
    finally:
        kill_session(pid)
        settled.reap_orphans()


def test_script(standalone: Standalone, spool: Path, tmp_path: Path) -> None:
    """script(1) has a terminal of its own in the tree, and shows it on one that another program has made."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe('script', ['script', '-q', '-c', 'bash --norc', 'typescript'], environment(tmp_path))
    said = b''
    os.write(fd, b'echo $((6*7))\r')
    while b'42\r\n' not in said:
        said += os.read(fd, 4096)
    members = session_members(pid)
    image = kill(standalone, pid)
    os.close(fd)
    assert len(members) >= 2
    seen = Screen('restore', image, '--wait', '--standalone', '--spool', str(spool))
    try:
        seen.until('its root is process')
        seen.type('echo $((6*8)); stty -a; tty\r')
        seen.until('48')
        seen.until('/dev/pts/')
        seen.type('exit\r')
        assert seen.end() == 0, seen.said
    finally:
        seen.close()
    typescript = (tmp_path / 'typescript').read_text()
    assert re.search(r'42\r?\n(.*\n)*.*48\r?\n', typescript), typescript


EXPECT = """
import os, pty
pid, fd = pty.fork()
if pid == 0:
    os.execvp('sh', ['sh', '-c', 'stty -echo; echo ready; while read a b; do echo "= $((a+b))"; done'])
said = b''
def expect(words):
    global said
    while words not in said:
        said += os.read(fd, 4096)
    said = said.split(words, 1)[1]
expect(b'ready\\r\\n')
rounds = 0
while not os.path.exists('enough'):
    rounds += 1
    os.write(fd, f'{rounds} {rounds}\\n'.encode())
    expect(f'= {rounds + rounds}\\r\\n'.encode())
    if rounds == 10:
        open('working', 'w').close()
os.close(fd)
print(rounds, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_expect(program: Program, standalone: Standalone, tmp_path: Path) -> None:
    """As pexpect does it: questions and answers over a terminal, and some may be on their way."""
    process = program(sys.executable, '-I', '-c', EXPECT)
    await_that('it works', (tmp_path / 'working').exists)
    image = kill(standalone, process.pid)
    process.wait()
    (tmp_path / 'enough').touch()
    with standalone.restore(image) as restored:
        restored.finish()
    assert (tmp_path / 'output.errors').read_text() == ''
    rounds, status = (tmp_path / 'output').read_text().split()
    assert int(rounds) >= 10
    assert int(status) == -1        # SIGHUP, as the terminal was closed

# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl restore against a daemon whose workers play scenes: what the command does with the tree, its signals and its
terminal. The tree is a shell script, so that its end, its terminal and the signals it gets are real."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import Ctl, Fifo
from tests.jobs.scripted import ScriptedDaemon
from tests.jobs.test_spool import write_image
from tests.lib.bus import ROOT, read_line
from tests.lib.settled import children
from tests.programs.conftest import await_that

pytestmark = pytest.mark.needs('dbus')

# a tree that says which signal it got, by its exit status
TRAPS = '; '.join(f'trap "exit {status}" {name}' for name, status in
                  (('INT', 42), ('TERM', 43), ('HUP', 44), ('QUIT', 45), ('USR1', 46), ('USR2', 47)))
ENDLESS = f'{TRAPS}; echo ready; while :; do sleep 0.02; done'


class Stage:
    """A daemon with one image; `ctl` talks to it."""

    def __init__(self, daemon: ScriptedDaemon, image: str) -> None:
        self.daemon, self.image = daemon, image
        self.ctl = Ctl('--address', daemon.address)

    def wait(self) -> 'tuple[subprocess.Popen[str], int]':
        """`restore --wait`, once it attends; and the pid of the root."""
        process = self.ctl.start('restore', self.image, '--wait')
        assert process.stderr is not None
        line = read_line(process.stderr.fileno(), 30)
        assert 'its root is process' in line, line + str(process.communicate())
        return process, int(line.split()[-1])

    def job(self) -> dict[str, object]:
        [job] = self.ctl('jobs', '--json').json
        return dict(job)


@pytest.fixture
def stage(tmp_path: Path, spool: Path) -> Iterator[Callable[..., Stage]]:
    """stage(scene, script): a daemon whose restores do that."""
    running: list[ScriptedDaemon] = []

    def make(scene: str, script: str = '', **env: str) -> Stage:
        image = write_image(spool, os.getuid(), target=f'cgroup:/{scene}')
        running.append(ScriptedDaemon(tmp_path, spool, env={'PLAYER_SCRIPT': script, **env}))
        return Stage(running[-1].start(), image)

    yield make
    for one in running:
        one.stop()


def end(pid: int) -> None:
    """Of a tree that outlives its worker, whose child it may still be; then it becomes ours (settled.py)."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
    finally:
        os.close(pidfd)


def test_a_tree_that_is_not_waited_for(stage: Callable[..., Stage]) -> None:
    here = stage('program', 'exec sleep 1000')
    done = here.ctl('restore', here.image)
    assert done.status == 0, done.err
    root = int(done.out)
    assert done.err == '1 process with 1 task restored in 1.23 ms. The tree runs.\n'
    here.daemon.stop()
    end(root)


@pytest.mark.parametrize('flag', ['--detach', '--leave-stopped'])
def test_as_json(stage: Callable[..., Stage], flag: str) -> None:
    here = stage('restore')
    done = here.ctl('restore', here.image, flag, '--json')
    assert (done.status, done.json) == (0, {'image': here.image, 'root': 4242, 'tasks': 2})


@pytest.mark.parametrize(('script', 'status'), [('exit 7', 7), ('kill -TERM $$', 143), ('exit 0', 0)])
def test_the_status_is_that_of_the_root(stage: Callable[..., Stage], script: str, status: int) -> None:
    here = stage('program', script)
    done = here.ctl('restore', here.image, '--wait')
    assert (done.status, done.out) == (status, ''), done.err
    document = here.ctl('restore', here.image, '--wait', '--json')
    assert (document.status, document.json['exit_status']) == (status, status)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
                                    signal.SIGUSR2])
def test_signals_are_passed_on(stage: Callable[..., Stage], tmp_path: Path, number: signal.Signals) -> None:
    fifo = Fifo(tmp_path / 'ready')
    here = stage('program', f'{TRAPS}; echo ready > {fifo.path}; while :; do sleep 0.02; done')
    process, _ = here.wait()
    fifo.wait()
    fifo.close()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 42 + [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
                                       signal.SIGUSR2].index(number)


def test_stop_and_go(stage: Callable[..., Stage]) -> None:
    here = stage('program', 'exec sleep 1000')
    process, root = here.wait()
    process.send_signal(signal.SIGTSTP)
    assert os.waitid(os.P_PID, process.pid, os.WSTOPPED) is not None
    deadline = time.monotonic() + 10
    while state_of(root) != 'T':        # stopping takes a moment, and is told to its parent only
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM


def state_of(pid: int) -> str:
    return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]


def test_the_death_of_the_command_is_not_the_trees(stage: Callable[..., Stage]) -> None:
    here = stage('program', 'exec sleep 1000')
    process, root = here.wait()
    process.kill()
    process.communicate()
    await_that('the job lets go of it', lambda: here.job()['state'] == 'done')
    assert state_of(root) == 'S'
    os.kill(root, signal.SIGKILL)


def test_a_cancelled_attendance_leaves_the_tree(stage: Callable[..., Stage]) -> None:
    here = stage('program', 'exec sleep 1000')
    process, root = here.wait()
    assert here.ctl('cancel', str(here.job()['job'])).status == 0
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, '')
    assert err == f'The tree runs on by itself; its root is {root}.\n'
    end(root)


def test_a_worker_that_dies_while_it_attends(stage: Callable[..., Stage]) -> None:
    here = stage('desert')
    done = here.ctl('restore', here.image, '--wait')
    assert done.status == 1
    assert 'the tree may run on, as process 4242' in done.err
    assert 'hint: ' in done.err


def test_a_daemon_that_dies_while_it_attends(stage: Callable[..., Stage]) -> None:
    here = stage('program', 'exec sleep 1000')
    process, root = here.wait()
    os.kill(here.daemon.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 69
    assert 'one that runs goes on' in err
    assert state_of(root) == 'S'
    end(root)


def test_an_interrupt_before_the_tree_runs_cancels(stage: Callable[..., Stage], tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / 'here')
    here = stage('slow', PLAYER_FIFO=str(fifo.path))
    process = here.ctl.start('restore', here.image, '--wait')
    fifo.wait()
    fifo.close()
    done = here.ctl.interrupt(process)
    assert (done.status, 'as you wish' in done.err) == (130, True)


def test_a_dry_run_lists_what_stands_in_the_way(stage: Callable[..., Stage]) -> None:
    here = stage('obstacles')
    done = here.ctl('restore', here.image, '--dry-run', '--changed-files', 'rollback')
    assert done.status == 75        # numbers in use: try again when they are not
    assert 'in use by cat[8]' in done.out
    assert done.out.endswith(f'hint: use --new-pidns\n{here.image} cannot be restored: 1 refusal.\n')
    document = here.ctl('restore', here.image, '--dry-run', '--json').json
    assert (document['image'], document['possible']) == (here.image, False)
    assert [len(document[name]) for name in ('refusals', 'warnings')] == [1, 1]


@pytest.mark.parametrize(('args', 'status', 'words'), [
    (['--cgroup', 'a/b'], 2, 'absolute path'), (['--cgroup', '/a/../b'], 2, 'absolute path')])
def test_what_the_daemon_does_not_take(stage: Callable[..., Stage], args: list[str], status: int, words: str) -> None:
    here = stage('restore')
    done = here.ctl('restore', here.image, *args)
    assert (done.status, words in done.err) == (status, True)


def test_a_limit_for_files_that_are_not_saved() -> None:
    done = Ctl()('checkpoint', '1', '--save-limit', '1G')
    assert (done.status, 'hint: add --save-files' in done.err) == (2, True)


class Screen:
    """ckptctl on a terminal of 100 columns; what it shows is read with `until`."""

    def __init__(self, *args: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            # pty.fork leaves the tty as the kernel makes it: the client is told of its size like by any emulator
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 100, 0, 0))
            os.execve(sys.executable, [sys.executable, '-m', 'ckptd.cli', *args],
                      {**os.environ, 'TERM': 'xterm-256color', 'NO_COLOR': '1'})
        self._pidfd = os.pidfd_open(self.pid)
        self.said, self._seen = '', 0

    def until(self, words: str) -> None:
        """Read until the words were shown, after those of the last time; the end of the terminal is an error."""
        while (at := self.said.find(words, self._seen)) < 0:
            self.said += os.read(self.fd, 65536).decode()
        self._seen = at + len(words)

    def has_ended(self) -> bool:
        """Within a moment."""
        return bool(select.select([self._pidfd], [], [], 0.2)[0])

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def end(self) -> int:
        try:
            while chunk := os.read(self.fd, 65536):
                self.said += chunk.decode()
        except OSError:     # EIO: the other side of a pseudo-terminal is closed (pty(7))
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._pidfd)


@contextmanager
def screen(here: Stage, *args: str) -> Iterator[Screen]:
    made = Screen('restore', here.image, '--wait', '--address', here.daemon.address, *args)
    try:
        yield made
    finally:
        made.close()


def test_the_terminal_is_the_trees(stage: Callable[..., Stage]) -> None:
    here = stage('program', 'tty; stty size; echo name:; read name; stty -echo; echo word:; read word; '
                            'echo "$name $word"; exit 5')
    with screen(here) as seen:
        seen.until('name:')
        assert '/dev/pts/' in seen.said
        assert '40 100' in seen.said
        seen.type('alpha\r')
        seen.until('word:')
        seen.type('beta\r')
        seen.until('alpha beta')
        assert seen.end() == 5
    assert seen.said.count('beta') == 1         # the tree's own settings say what is echoed
    assert '\r\n' in seen.said


def test_a_dry_run_has_the_terminal_that_the_tree_would_get(stage: Callable[..., Stage]) -> None:
    with screen(stage('obstacles'), '--dry-run') as seen:
        seen.until('in use by cat[8] on its terminal')
        assert seen.end() == 75


def test_keys_are_signals_of_the_trees_terminal(stage: Callable[..., Stage]) -> None:
    with screen(stage('program', ENDLESS)) as seen:
        seen.until('ready')
        seen.type('\x03')
        assert seen.end() == 42, seen.said


def test_the_size_follows(stage: Callable[..., Stage]) -> None:
    script = 'trap "stty size; exit 6" WINCH; echo ready; while :; do sleep 0.02; done'
    with screen(stage('program', script)) as seen:
        seen.until('ready')
        fcntl.ioctl(seen.fd, termios.TIOCSWINSZ, struct.pack('HHHH', 33, 77, 0, 0))
        assert seen.end() == 6
        assert '33 77' in seen.said


def test_all_that_was_written_is_shown_and_the_terminal_is_as_it_was(stage: Callable[..., Stage]) -> None:
    here = stage('program', 'stty raw -echo; seq 1 20000; exit 0')
    with screen(here) as seen:
        before = termios.tcgetattr(seen.fd)
        seen.until('19999')
        seen.until('20000')
        assert seen.end() == 0
        assert termios.tcgetattr(seen.fd) == before


def test_the_death_of_the_command_does_not_hang_up_the_terminal(stage: Callable[..., Stage], tmp_path: Path) -> None:
    """The tree goes on writing, more than fits into the terminal."""
    count = tmp_path / 'count'
    line = 'x' * 2000
    here = stage('program', f'trap "exit 9" HUP; i=0; while echo {line}; do i=$((i+1)); echo $i > {count}; done')
    with screen(here) as seen:
        seen.until(line)
        root = int(seen.said.split('its root is process ')[1].split('\r')[0])
        os.kill(seen.pid, signal.SIGKILL)
        os.waitpid(seen.pid, 0)
        [keeper] = [pid for pid in children() if Path(f'/proc/{pid}/cmdline').read_bytes().find(b'ckptd.cli') >= 0]
        before = int(count.read_text() or 0)
        await_that('the tree writes on', lambda: int(count.read_text() or 0) > before + 200)
        end(root)
        assert os.waitpid(keeper, 0) == (keeper, 0)


def test_the_line_of_the_command_is_cleared(stage: Callable[..., Stage]) -> None:
    with screen(stage('program', 'echo begin; read name')) as seen:
        seen.until('its root is process')
        seen.until('\r\x1b[2K')
        seen.until('begin')
        seen.type('\r')
        assert seen.end() == 0


def test_a_tree_without_a_terminal_leaves_ours_alone(stage: Callable[..., Stage]) -> None:
    """Nobody reads the pseudo-terminal, so it is given up, and Ctrl-C is a signal to pass on."""
    with screen(stage('blind', f'{TRAPS}; while :; do sleep 0.02; done')) as seen:
        seen.until('its root is process')
        while not seen.has_ended():
            seen.type('\x03')
        assert seen.end() == 42

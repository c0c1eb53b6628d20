# SPDX-License-Identifier: LGPL-2.1-or-later
"""ckptctl restore with the real engine: small programs end to end."""

import os
import pty
import signal
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.kernel.task import read_children
from tests.cli.conftest import Ctl
from tests.cli.test_restore import Screen, end, state_of
from tests.lib.bus import Daemon, read_line
from tests.lib.settled import children

pytestmark = pytest.mark.needs('dbus', 'ptrace', 'root')

TRAP = 'trap "exit 42" USR1; while :; do sleep 0.02; done'


@pytest.fixture
def program() -> Iterator[Callable[..., 'subprocess.Popen[bytes]']]:
    """Start a program in a session of its own, on /dev/null."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> 'subprocess.Popen[bytes]':
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def dumped(ctl: Ctl, process: 'subprocess.Popen[bytes]', *options: str) -> str:
    """The image of a program that is dead now, and reaped with its children, who are ours since: its pid is free."""
    done = ctl('checkpoint', str(process.pid), '--kill', '--quiet', *options)
    assert done.status == 0, done.err
    assert process.wait(10) == -signal.SIGKILL
    for pid in children():
        if os.getsid(pid) == process.pid:
            os.waitpid(pid, 0)
    return done.out.strip()


@pytest.mark.parametrize('how', ['standalone', 'ctl'])
def test_a_tree_comes_back_and_outlives_the_command(how: str, program: Callable[..., 'subprocess.Popen[bytes]'],
                                                    request: pytest.FixtureRequest) -> None:
    ctl: Ctl = request.getfixturevalue(how)
    process = program('sleep', '1000')
    image = dumped(ctl, process)
    done = ctl('restore', image, '--json')
    assert done.status == 0, done.err
    assert (done.json['root'], done.json['tasks'], done.json['image']) == (process.pid, 1, image)
    assert Path(f'/proc/{process.pid}/comm').read_text() == 'sleep\n'
    twice = ctl('restore', image)
    assert (twice.status, f'pid {process.pid}: the pid is in use' in twice.err) == (75, True)
    dry = ctl('restore', image, '--dry-run')
    assert dry.status == twice.status
    assert 'cannot be restored' in dry.out
    assert state_of(process.pid) == 'S'
    end(process.pid)


def test_what_can_be_restored(ctl: Ctl, program: Callable[..., 'subprocess.Popen[bytes]']) -> None:
    image = dumped(ctl, program('sleep', '1000'))
    done = ctl('restore', image, '--dry-run')
    assert (done.status, done.out.splitlines()[-1].startswith(f'{image} can be restored')) == (0, True), done.err


@pytest.mark.parametrize('how', ['standalone', 'ctl'])
def test_wait_passes_signals_on_and_brings_the_status(how: str, program: Callable[..., 'subprocess.Popen[bytes]'],
                                                      request: pytest.FixtureRequest) -> None:
    ctl: Ctl = request.getfixturevalue(how)
    image = dumped(ctl, program('sh', '-c', TRAP))
    process = ctl.start('restore', image, '--wait')
    assert process.stderr is not None
    assert 'its root is process' in read_line(process.stderr.fileno(), 30)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 42, err


def test_a_daemon_that_dies_leaves_the_tree(daemon: Daemon, ctl: Ctl,
                                            program: Callable[..., 'subprocess.Popen[bytes]']) -> None:
    image = dumped(ctl, program('sleep', '1000'))
    process = ctl.start('restore', image, '--wait')
    assert process.stderr is not None
    root = int(read_line(process.stderr.fileno(), 30).split()[-1])
    os.kill(daemon.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 69
    assert state_of(root) == 'S'
    end(root)


def test_a_tree_that_is_left_stopped(ctl: Ctl, program: Callable[..., 'subprocess.Popen[bytes]']) -> None:
    image = dumped(ctl, program('sleep', '1000'))
    done = ctl('restore', image, '--leave-stopped')
    assert done.status == 0, done.err
    assert 'kill -CONT' in done.err
    assert state_of(int(done.out)) == 'T'
    end(int(done.out))


def test_pids_of_its_own(ctl: Ctl, program: Callable[..., 'subprocess.Popen[bytes]']) -> None:
    """While the original runs."""
    process = program('sleep', '1000')
    image = ctl('checkpoint', str(process.pid), '--quiet').out.strip()
    done = ctl('restore', image, '--new-pidns')
    assert done.status == 0, done.err
    assert f'The pid of the root is {process.pid} in its pid namespace and {done.out.strip()} outside.' in done.err
    root = int(done.out)
    numbers = next(line for line in Path(f'/proc/{root}/status').read_text().splitlines() if line.startswith('NSpid'))
    assert numbers.split()[-1] == str(process.pid)
    end(root)


def test_a_terminal_for_the_one_that_is_gone(daemon: Daemon, ctl: Ctl) -> None:
    """A shell that reads from its terminal goes on reading, from the one that the command was given on."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp('sh', ['sh', '-c', 'echo name:; read name; echo "it is $name"; exit 5'])
    said = b''
    while b'name:' not in said:
        said += os.read(fd, 4096)
    seen = Screen('restore', dumped_on_terminal(ctl, pid, fd), '--wait', '--address', daemon.address)
    try:
        seen.until('its root is process')
        seen.type('alpha\r')
        assert seen.end() == 5, seen.said
        assert 'it is alpha' in seen.said
    finally:
        seen.close()


@pytest.mark.needs('less')
def test_a_full_screen_program_draws_again(daemon: Daemon, ctl: Ctl, tmp_path: Path) -> None:
    """less(1), with the settings that it had set. Ours are as before when it has ended."""
    text = tmp_path / 'text'
    text.write_text(''.join(f'row {number}\n' for number in range(300)))
    pid, fd = pty.fork()
    if pid == 0:
        os.execvpe('less', ['less', str(text)], {**os.environ, 'TERM': 'xterm', 'LESS': ''})
    said = b''
    while b'row 20' not in said:
        said += os.read(fd, 4096)
    settings = termios.tcgetattr(fd)
    image = dumped_on_terminal(ctl, pid, fd)
    refused = ctl('restore', image)
    assert (refused.status, '--terminal=detach' in refused.err) == (3, True), refused.err
    seen = Screen('restore', image, '--wait', '--address', daemon.address)
    try:
        before = termios.tcgetattr(seen.fd)
        seen.until('its root is process')
        seen.until('row 20')
        at = Path(f'/proc/{pid}/fd/1').readlink()
        inside = os.open(at, os.O_RDWR | os.O_NOCTTY)
        assert termios.tcgetattr(inside) == settings
        os.close(inside)
        seen.type('G')
        seen.until('row 299')
        seen.type('q')
        assert seen.end() == 0, seen.said
        assert termios.tcgetattr(seen.fd) == before
    finally:
        seen.close()


def test_a_tree_without_its_terminal(ctl: Ctl, tmp_path: Path) -> None:
    """cat(1) reads end-of-file from a terminal that is hung up."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execvp('sh', ['sh', '-c', f'echo ready; read line; tty > {tmp_path}/said; echo "$?" >> {tmp_path}/said'])
    said = b''
    while b'ready\r\n' not in said:
        said += os.read(fd, 4096)
    image = dumped_on_terminal(ctl, pid, fd)
    dry = ctl('restore', image, '--terminal=detach', '--dry-run', '--json').json
    assert {row['resource'] for row in dry['warnings']} >= {'terminal', 'fd 0'}
    done = ctl('restore', image, '--terminal=detach')
    assert done.status == 0, done.err
    os.waitpid(pid, 0)
    assert (tmp_path / 'said').read_text() == 'not a tty\n1\n'


def dumped_on_terminal(ctl: Ctl, pid: int, fd: int) -> str:
    """The image of a program that is dead now, as is its terminal."""
    done = ctl('checkpoint', str(pid), '--kill')
    assert done.status == 0, done.err
    [command] = [line for line in done.err.splitlines() if line.startswith('To bring it back: ')]
    assert '--wait' in command.split()
    os.waitpid(pid, 0)
    os.close(fd)
    return done.out.strip()


@pytest.mark.needs('less')
def test_a_job_of_a_shell_draws_again(daemon: Daemon, ctl: Ctl, tmp_path: Path) -> None:
    """The shell, which leads the session and shows the prompt, is no part of the tree."""
    (tmp_path / 'text').write_text(''.join(f'row {number}\n' for number in range(300)))
    shell, fd = pty.fork()
    if shell == 0:
        os.chdir(tmp_path)
        os.execvpe('bash', ['bash', '--norc', '-i'], {**os.environ, 'TERM': 'xterm', 'LESS': '', 'PS1': '$ '})
    os.write(fd, b'less text\r')
    said = b''
    while b'row 20' not in said:
        said += os.read(fd, 4096)
    [pid] = read_children(shell, shell)
    assert os.getpgid(pid) == pid
    done = ctl('checkpoint', str(pid), '--kill', '--quiet')
    assert done.status == 0, done.err
    os.kill(shell, signal.SIGKILL)
    os.waitpid(shell, 0)
    os.close(fd)
    seen = Screen('restore', done.out.strip(), '--wait', '--address', daemon.address)
    try:
        seen.until('its root is process')
        seen.until('row 20')
        assert os.getsid(pid) == pid
        seen.type('G')
        seen.until('row 299')
        seen.type('q')
        assert seen.end() == 0, seen.said
    finally:
        seen.close()

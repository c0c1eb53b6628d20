# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs, freezing, interrupts, and what happens to a client that is killed."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.conftest import Ctl, Fifo
from tests.lib.bus import ROOT, Daemon, family, read_line
from tests.lib.settled import children
from tests.lib.victim import Victim

pytestmark = pytest.mark.needs('dbus', 'ptrace')


@pytest.fixture
def tree(victim: Callable[..., Victim]) -> Victim:
    return victim('counter', '2')


def images(spool: Path) -> list[str]:
    return [path.name for path in spool.iterdir()]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cancels_the_job_and_leaves_nothing(number: signal.Signals, paused: tuple[Ctl, Fifo], tree: Victim,
                                                         spool: Path) -> None:
    ctl, reached = paused
    process = ctl.start('checkpoint', str(tree.pid))
    reached.wait()
    done = ctl.interrupt(process, number)
    assert done.status == 130
    assert 'cancelled' in done.err
    assert images(spool) == []
    tree.finish()


def test_a_detached_job_is_listed_and_cancelled(paused: tuple[Ctl, Fifo], tree: Victim, spool: Path) -> None:
    ctl, reached = paused
    started = ctl('checkpoint', str(tree.pid), '--detach', '--json').json
    reached.wait()
    [job] = ctl('jobs', '--json').json
    assert (job['job'], job['path'], job['state'], job['phase'], job['target']) == (
        started['job'], started['path'], 'running', 'memory', f'pid:{tree.pid}')
    assert 'running' in ctl('jobs').out
    assert ctl('cancel', str(job['job'])).status == 0
    tree.finish()
    # it runs before what there is of the image is removed
    deadline = time.monotonic() + 10
    while [job['state'] for job in ctl('jobs', '--json').json] != ['cancelled']:
        assert time.monotonic() < deadline
    assert images(spool) == []


def test_a_daemon_that_dies_is_reported_and_the_tree_runs_on(start_daemon: Callable[..., Daemon], tree: Victim,
                                                             tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / 'fault')
    daemon = start_daemon(env={'CKPTD_FAULT': 'memory-half=pause', 'CKPTD_FAULT_FILE': str(fifo.path)})
    ctl = Ctl('--address', daemon.address)
    process = ctl.start('checkpoint', str(tree.pid))
    fifo.wait()
    fifo.close()
    workers = [os.pidfd_open(pid) for pid in family(daemon.pid)]
    os.kill(daemon.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (69, '')
    assert f'while it worked on pid:{tree.pid}' in err
    # the worker pauses and notices nothing; one that works would have seen the end of its channel
    for pidfd in workers:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)
    start_daemon()      # undoes the freeze
    tree.finish()


def test_freeze_holds_until_thaw(ctl: Ctl, tree: Victim) -> None:
    frozen = ctl('freeze', str(tree.pid), '--json')
    assert frozen.status == 0, frozen.err
    assert frozen.json == {'target': f'pid:{tree.pid}', 'tasks': 3}
    assert ctl('thaw', str(tree.pid)).out == f'pid:{tree.pid} runs on.\n'
    tree.finish()


def test_leave_frozen_is_undone_by_thaw(ctl: Ctl, tree: Victim) -> None:
    done = ctl('checkpoint', str(tree.pid), '--leave-frozen')
    assert f'ckptctl thaw pid:{tree.pid}' in done.err
    assert ctl('thaw', str(tree.pid)).status == 0
    tree.finish()


@pytest.mark.parametrize('command', [['freeze'], ['checkpoint', '--leave-frozen']])
def test_a_private_daemon_holds_until_the_interrupt(command: list[str], standalone: Ctl, tree: Victim) -> None:
    process = standalone.start(*command, str(tree.pid))
    assert process.stderr is not None
    while 'holding' not in (line := read_line(process.stderr.fileno(), 30)):
        assert line, process.communicate()
    thaw = Ctl('--standalone')('thaw', str(tree.pid))
    assert (thaw.status, f'ckptctl[{process.pid}]' in thaw.err) == (5, True)
    done = standalone.interrupt(process)
    assert done.status == 0
    assert 'runs on' in done.err
    tree.finish()


def test_standalone_needs_nothing_and_leaves_the_image_only(standalone: Ctl, tree: Victim, spool: Path) -> None:
    done = standalone('checkpoint', str(tree.pid), '--json')
    assert done.status == 0, done.err
    assert images(spool) == [done.json['image']]
    assert standalone('list', '--no-legend').out.split()[0] == done.json['image']
    tree.finish()


def test_a_private_daemon_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    done = Ctl('--standalone', '--spool', str(tmp_path / 'file' / 'spool'))('list')
    assert done.status == 69
    assert 'the private daemon did not start' in done.err
    assert str(tmp_path / 'file') in done.err


def test_a_directory_called_ckptd_is_not_what_runs(tmp_path: Path, spool: Path) -> None:
    (tmp_path / 'ckptd').mkdir()
    (tmp_path / 'ckptd' / '__init__.py').write_text('raise SystemExit("trapped")')
    program = 'import sys; from ckptd.cli.main import main; sys.exit(main())'
    done = subprocess.run([sys.executable, '-P', '-c', program, 'list', '--standalone', '--spool', str(spool)],
                          capture_output=True, text=True, timeout=50, cwd=tmp_path, check=False,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stderr) == (0, 'No images.\n')


def test_a_client_that_is_killed_takes_its_daemon_along(standalone: Ctl, tree: Victim, spool: Path,
                                                        tmp_path: Path) -> None:
    fifo = Fifo(tmp_path / 'fault')
    standalone.env |= {'CKPTD_FAULT': 'memory-half=pause', 'CKPTD_FAULT_FILE': str(fifo.path)}
    process = standalone.start('checkpoint', str(tree.pid))
    fifo.wait()
    fifo.close()
    process.kill()
    process.communicate()
    # the settled check of every test finds what is left; here: that the orphans came to us, and end
    for pid in set(children()) - {tree.pid}:
        os.waitpid(pid, 0)
    assert images(spool) == []
    tree.finish()


def test_monitor_tells_what_happens_until_the_interrupt(ctl: Ctl, tree: Victim) -> None:
    people, machine = ctl.start('monitor'), ctl.start('monitor', '--json', stderr=subprocess.DEVNULL)
    assert people.stderr is not None
    assert 'Ctrl-C' in read_line(people.stderr.fileno(), 30)
    first = ctl('checkpoint', str(tree.pid), '-q').out.strip()
    # the second monitor says nothing when it has subscribed; removing and its signal come after one checkpoint at least
    seen: list[dict[str, object]] = []
    assert machine.stdout is not None
    ctl('remove', first)
    while not seen or seen[-1]['signal'] != 'ImageRemoved':
        line = read_line(machine.stdout.fileno(), 30)
        assert line, seen
        seen.append(json.loads(line))
    assert seen[-1]['arguments']['image'] == first  # type: ignore[index]
    assert ctl.interrupt(machine).status == 0
    done = ctl.interrupt(people)
    assert done.status == 0
    assert f'checkpoint pid:{tree.pid}' in done.out
    assert f'image {first}' in done.out
    assert re.search(r'JobRemoved +job \d+ +done', done.out)


def in_a_terminal(*args: str, **env: str) -> tuple[int, str]:
    """Exit status and everything that ckptctl wrote to a terminal of 100 columns."""
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, '-m', 'ckptd.cli', *args],
                  {**os.environ, 'TERM': 'xterm-256color', 'COLUMNS': '100', 'LINES': '40', **env})
    said = b''
    try:
        while chunk := os.read(fd, 65536):
            said += chunk
    except OSError:     # EIO: the other side of a pseudo-terminal is closed (pty(7))
        pass
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


def test_a_terminal_gets_a_progress_bar(daemon: Daemon, tree: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('NO_COLOR', raising=False)
    status, said = in_a_terminal('checkpoint', str(tree.pid), '--address', daemon.address)
    assert status == 0, said
    assert '━' in said
    assert '100%' in said
    assert '\x1b[?25h' in said      # the cursor is back


def test_no_color_is_obeyed_on_a_terminal(daemon: Daemon, tree: Victim) -> None:
    status, said = in_a_terminal('tree', str(tree.pid), '--address', daemon.address, NO_COLOR='1')
    assert status == 0, said
    assert '├─' in said
    assert '\x1b[' not in said

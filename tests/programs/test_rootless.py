# SPDX-License-Identifier: LGPL-2.1-or-later
"""An ordinary user, no service, no configuration: an own tree is checkpointed, killed, and restored with its pids.

Nobody but root may choose pids, so it is restored into a user and pid namespace of its own.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from tests.lib.bus import ROOT, family
from tests.lib.victim import VICTIMS, Victim, build
from tests.programs.conftest import await_that
from tests.worker.driver import ORDINARY_UID, as_user, place_of

pytestmark = [pytest.mark.needs('dbus', 'ptrace', 'gcc', 'user-namespaces'), pytest.mark.timeout(120)]

UID = os.geteuid() or ORDINARY_UID


def requirements(name: str) -> set[str]:
    """What a distribution needs to run, by name, itself included; extras aside."""
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [match[0] for line in importlib.metadata.requires(name) or ()
                     if ';' not in line and (match := re.match(r'[\w.-]+', line))]
    return found


@pytest.fixture(scope='module')
def installed() -> Iterator[Path]:
    """A directory that everybody can read: ckptd and what it imports. The checkout may be in a home directory."""
    with place_of(UID) as home:
        library = home.parent / 'lib'
        library.mkdir(mode=0o755)
        shutil.copytree(ROOT / 'ckptd', library / 'ckptd', ignore=shutil.ignore_patterns('__pycache__'))
        for name in requirements('ckptd') - {'ckptd'}:
            distribution = importlib.metadata.distribution(name)
            for file in distribution.files or ():
                if '..' not in file.parts and '__pycache__' not in file.parts:
                    target = library / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(distribution.locate_file(file), target)
        yield library


@pytest.fixture
def home() -> Iterator[Path]:
    with place_of(UID) as path:
        yield path


class Ckptctl:
    """`ckptctl --standalone --json` of a user who has only a home directory."""

    def __init__(self, home: Path, installed: Path) -> None:
        (home / 'run').mkdir(mode=0o700)
        self._home, self._installed = home, installed

    def start(self, *args: str) -> 'subprocess.Popen[str]':
        return subprocess.Popen(
            [sys.executable, '-m', 'ckptd.cli', *args, '--standalone', '--spool', str(self._home / 'spool'), '--json'],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self._home,
            env={'PATH': '/usr/bin:/bin', 'HOME': str(self._home), 'PYTHONPATH': str(self._installed),
                 'PYTHONDONTWRITEBYTECODE': '1', 'XDG_RUNTIME_DIR': str(self._home / 'run')})

    def __call__(self, *args: str) -> Any:
        """Its answer; the exit status has to be 0, with --wait that of the restored root."""
        with self.start(*args) as process:
            return self.answer(process)

    @staticmethod
    def answer(process: 'subprocess.Popen[str]') -> Any:
        try:
            out, errors = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
        assert process.returncode == 0, f'{process.args}: {out}{errors}'
        return json.loads(out) if out.strip() else None


@pytest.mark.parametrize('name', [
    'aio_rings', 'files', 'inet_sockets', 'interrupted', 'io_urings', 'memory', 'pipes', 'registers', 'signals',
    'tcp_connections', 'threads', 'timers', 'tree', 'unix_names'])
def test_a_tree_comes_back(home: Path, installed: Path, name: str) -> None:
    """The victim checks itself: pids, thread ids, memory, and whatever it is about."""
    program = Path(shutil.copy(build(name), home.parent))
    shutil.copy(VICTIMS / 'victim.py', home.parent)     # where a victim in Python finds it

    def work() -> None:
        assert os.geteuid() == UID
        ckptctl = Ckptctl(home, installed)
        # the parent of its root is then the first process of the namespace
        arguments = ['1'] if name == 'tree' else []
        with Victim(name, *arguments, directory=home / 'victim', program=program) as running:
            result = ckptctl('checkpoint', str(running.pid), '--kill')
            assert result['freeze_mode'] == 'ptrace'
            assert running.process.wait(10) == -signal.SIGKILL
            ckptctl('verify', result['image'])
            with running.told_to_go():
                ckptctl('restore', result['image'], '--wait')
            assert running.output == ''

    as_user(UID, home, work)


def test_beside_the_original(home: Path, installed: Path) -> None:
    """Pids are a namespace's own: while the tree runs on, another with the same ones comes from its image."""
    program = Path(shutil.copy(build('threads'), home.parent / 'threads'))

    def work() -> None:
        ckptctl = Ckptctl(home, installed)
        with Victim('threads', directory=home / 'victim', program=program) as running:
            result = ckptctl('checkpoint', str(running.pid))
            with ckptctl.start('restore', result['image'], '--wait') as restoring:
                await_that('there are two', lambda: restoring.poll() is not None or len(running_from(program)) == 2)
                with running.told_to_go():      # one of them takes this word
                    running.go()
                    ckptctl.answer(restoring)
                    running.expect_success()
            assert running.output == ''

    as_user(UID, home, work)


def test_counters_go_on_through_two_rounds(home: Path, installed: Path) -> None:
    """Nothing of root's has a part in it: what is there belongs to the user, in each round."""
    for script in ('counter.py', 'victim.py'):
        shutil.copy(VICTIMS / script, home.parent / script)
    program = home.parent / 'counter.py'

    def work() -> None:
        ckptctl = Ckptctl(home, installed)
        with Victim('counter', directory=home / 'victim', program=program) as running:
            result = ckptctl('checkpoint', str(running.pid), '--kill')
            assert running.process.wait(10) == -signal.SIGKILL
            with ckptctl.start('restore', result['image'], '--wait') as restoring:
                [root] = await_that('it counts again', lambda: restoring.poll() is not None or roots_of(program))
                assert owners_below(os.getpid()) == {UID}
                result = ckptctl('checkpoint', str(root), '--kill')
                restoring.wait(20)
            with running.told_to_go():
                ckptctl('restore', result['image'], '--wait')
            assert running.output == ''

    as_user(UID, home, work)


def running_from(program: Path) -> list[int]:
    """Processes, of whatever namespace below ours."""
    found = []
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if (entry / 'exe').readlink() == program:
                found.append(int(entry.name))
    return found


def roots_of(program: Path) -> list[int]:
    """Processes that run this script and are no children of another one that does."""
    found = {}
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if f'\0{program}\0'.encode() in (entry / 'cmdline').read_bytes():
                found[int(entry.name)] = read_stat(int(entry.name)).ppid
    return [pid for pid, parent in found.items() if parent not in found]


def owners_below(pid: int) -> set[int]:
    """All uids of a process and of what descends from it."""
    return {uid for process in (pid, *family(pid)) for uid in read_status(process).uids}

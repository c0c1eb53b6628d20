# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running victims: small programs that prepare something, say that they are ready, wait, then check themselves.

The handshake, the same for tests/victims/victim.h and tests/victims/victim.py:

    CKPTD_VICTIM_READY=fd      the victim writes "PID\\n" there once it is ready, and closes it
    CKPTD_VICTIM_GO=path       a FIFO that the victim has open for reading and writing; one byte from it means: check

stdin is /dev/null, stdout and stderr go to a file in the victim's directory, which is its working directory too. So a
ready victim holds nothing whose other end is outside its tree, and can be checkpointed, killed and restored.
"""

import contextlib
import fcntl
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tests.lib.bus import read_line

VICTIMS = Path(__file__).parents[1] / 'victims'
READY_TIMEOUT = 20.0
CHECK_TIMEOUT = 30.0
# those whose tasks run while they wait; all others are at rest, down to the last thread
RESTLESS = frozenset({'registers', 'threads', 'interpreter', 'counter'})
# their sleeps end, and with them threads, while we look; for how many seconds they sleep is their argument
BRIEF = frozenset({'interrupted', 'never_restarted'})


@functools.cache
def build(name: str) -> Path:
    """The compiled program tests/victims/NAME.c, or the script NAME.py itself."""
    script = VICTIMS / f'{name}.py'
    if script.exists():
        return script
    directory = VICTIMS / 'build'
    directory.mkdir(exist_ok=True)
    # by one test process at a time: a second one would replace a program that the first has begun to run
    with (directory / '.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make = subprocess.run(['make', '--no-print-directory', '-C', VICTIMS, f'build/{name}'],
                              capture_output=True, text=True, check=False)
    assert make.returncode == 0, make.stderr
    return directory / name


def names() -> list[str]:
    """Every victim there is."""
    return sorted(path.stem for path in VICTIMS.glob('*.[cp]*') if path.stem != 'victim')


class Victim:
    """One run of a victim, in a session of its own. pid is the root of its tree. program: a copy of the built one.
    uid: that it runs with."""

    def __init__(self, name: str, *args: str, directory: Path, env: dict[str, str] | None = None,
                 cgroup: Path | None = None, program: Path | None = None, uid: int | None = None) -> None:
        self.name, self.args, self.directory, self._program = name, args, directory, program
        self._env, self._cgroup, self._uid = env or {}, cgroup, uid
        self._process: subprocess.Popen[bytes] | None = None
        self.extra: dict[str, str] = {}

    @property
    def process(self) -> 'subprocess.Popen[bytes]':
        assert self._process is not None, 'the victim was not started'
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def fifo(self) -> Path:
        return self.directory / 'go'

    @property
    def output(self) -> str:
        return (self.directory / 'output').read_text(errors='replace')

    def start(self) -> Self:
        """Start it and return when it is ready."""
        program = self._program or build(self.name)
        command = [str(program)] if program.suffix != '.py' else [sys.executable, str(program)]
        self.directory.mkdir(mode=0o777)
        os.mkfifo(self.fifo)
        self.fifo.chmod(0o666)
        ready, theirs = os.pipe()
        try:
            with (self.directory / 'output').open('ab') as output:
                if self._uid is not None:
                    os.chown(self.directory, self._uid, self._uid)
                    os.fchown(output.fileno(), self._uid, self._uid)
                self._process = subprocess.Popen(
                    [*command, *self.args], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.directory,
                    pass_fds=[theirs], start_new_session=True, preexec_fn=self._enter_cgroup if self._cgroup else None,
                    user=self._uid, group=self._uid, extra_groups=None if self._uid is None else [self._uid],
                    env={**os.environ, 'CKPTD_VICTIM_READY': str(theirs), 'CKPTD_VICTIM_GO': str(self.fifo),
                         'PYTHONPATH': str(VICTIMS), 'PYTHONDONTWRITEBYTECODE': '1', **self._env})
            os.close(theirs)
            theirs = -1
            line = read_line(ready, READY_TIMEOUT)
            if line.endswith('\n') and read_line(ready, READY_TIMEOUT):
                raise AssertionError(f'{self} reported twice')
        finally:
            os.close(ready)
            if theirs != -1:
                os.close(theirs)
        if not line.endswith('\n'):
            self.close()
            raise AssertionError(f'{self} was not ready:\n{self.output}')
        self.await_waiting()
        return self

    def await_waiting(self) -> None:
        """Until the first thread is in read(2), where it waits for the word to go, and all others are at rest too."""
        deadline = time.monotonic() + READY_TIMEOUT
        while not self._waits():
            if time.monotonic() > deadline:
                raise AssertionError(f'{self} does not wait')
            os.sched_yield()

    def _waits(self) -> bool:
        try:
            # proc(5): number and arguments of the system call that the task is blocked in
            in_read = Path(f'/proc/{self.pid}/syscall').read_text().split()[0] == '0'
        except PermissionError:     # an ordinary user may not look at one that is not dumpable
            in_read = True
        return in_read and (self.name in RESTLESS or 'R' not in states(self.pid))

    def _enter_cgroup(self) -> None:
        assert self._cgroup is not None
        (self._cgroup / 'cgroup.procs').write_text('0')

    def go(self) -> None:
        """Tell it to check itself."""
        fd = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, b'g')
        finally:
            os.close(fd)

    def finish(self) -> None:
        """Tell it to check itself, wait, and fail with its own words when it did not find all as it was."""
        self.go()
        self.expect_success()

    @contextlib.contextmanager
    def told_to_go(self) -> Iterator[None]:
        """Tell one that is dead, and will be restored in this block: the FIFO keeps the word for it."""
        # with a reader and a writer nobody who opens it waits, and nothing in it is lost
        fifo = os.open(self.fifo, os.O_RDWR)
        try:
            self.go()
            yield
        finally:
            os.close(fifo)

    def expect_success(self) -> None:
        try:
            status = self.process.wait(CHECK_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f'{self} did not end:\n{self.output}') from None
        assert status == 0, f'{self} ended with {status}:\n{self.output}'

    def close(self) -> None:
        """Kill what is left of its session, the way a terminal's end would not spare it either."""
        if self._process is None:
            return
        kill_session(self.pid)
        self._process.wait()

    def __str__(self) -> str:
        return f'victim {shlex.join([self.name, *self.args])}'

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def states(root: int) -> str:
    """The state letters of all tasks of a tree that does not change."""
    letters = ''
    for task in Path(f'/proc/{root}/task').iterdir():
        letters += (task / 'stat').read_text(errors='replace').rpartition(')')[2].split()[0]
        letters += ''.join(states(int(child)) for child in (task / 'children').read_text().split())
    return letters


def kill_session(sid: int) -> None:
    """SIGKILL to every process of a session that is there now."""
    for pid in session_members(sid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def session_members(sid: int) -> list[int]:
    """Processes of the session and what descends from them, deepest first."""
    parents: dict[int, tuple[int, int]] = {}
    for entry in Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            # a name may be any bytes
            fields = (entry / 'stat').read_text(errors='replace').rpartition(')')[2].split()
            parents[int(entry.name)] = int(fields[1]), int(fields[3])
    members = {pid for pid, (_, session) in parents.items() if session == sid or pid == sid}
    while more := {pid for pid, (ppid, _) in parents.items() if ppid in members} - members:
        members |= more
    return sorted(members, reverse=True)

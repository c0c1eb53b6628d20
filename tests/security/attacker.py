# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ordinary users who ask a daemon of root: what they run, what they ask for, and what they make of their images.

    program = attacker.start(SOURCE)                    # ready when this returns
    image = attacker.take(program)                      # its image as a stream in memory; it is dead
    image.alter('Credentials', groups=())
    outcome = attacker.restore(attacker.bring(image))   # imported and restored, or refused
    assert program.ask() == 'what SOURCE says when it is told to go'

Each call on the bus is made by a child that has the user's ids and nothing else, so the daemon sees a caller as it
would see any other.
"""

import asyncio
import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from ckptd.client.sync import SyncCkptd, SyncJob, connect
from ckptd.errors import CkptError, Finding
from ckptd.kernel.pidfd import wait_dead
from tests.lib import settled
from tests.lib.brood import PR_SET_DUMPABLE, fork, libc
from tests.lib.bus import read_line
from tests.lib.gate import cgroup2_mount
from tests.lib.imgedit import ImageStream
from tests.lib.victim import VICTIMS, kill_session
from tests.worker.faulty import Gate, Standing, readable

T = TypeVar('T')

PATIENCE = 20.0     # seconds for what takes a fraction of one
# the venv's interpreter may be a link into a home directory of root
PYTHON = '/usr/bin/python3' if os.geteuid() == 0 else sys.executable
# what each source begins with: ready() and wait_for_go() of the victims, and a way to answer
PRELUDE = (VICTIMS / 'victim.py').read_text() + """
import ctypes, fcntl, mmap, struct, time
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def say(text):
    with open('answer', 'w') as answer:
        answer.write(str(text).replace('\\n', ' ') + '\\n')

def rest():
    ready()
    while True:
        time.sleep(1000)

"""


class Program:
    """A program of a user's, alone in its session. directory: where it works, and where its FIFOs are."""

    def __init__(self, process: 'subprocess.Popen[bytes]', directory: Path) -> None:
        self.process, self.directory = process, directory

    @property
    def pid(self) -> int:
        return self.process.pid

    def go(self) -> None:
        """Tell it to do what it is there for."""
        fd = os.open(self.directory / 'go', os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, b'g')
        finally:
            os.close(fd)

    def ask(self) -> str:
        """The same, and the line that it says then."""
        # with a writer of our own the FIFO is not at its end before the program opens it
        fd = os.open(self.directory / 'answer', os.O_RDWR | os.O_NONBLOCK)
        try:
            self.go()
            line = read_line(fd, PATIENCE)
        finally:
            os.close(fd)
        assert line.endswith('\n'), f'no answer from {self.pid}: {line!r}\n{self.output}'
        return line[:-1]

    @property
    def output(self) -> str:
        return (self.directory / 'output').read_text(errors='replace')

    def wait_dead(self) -> None:
        """Until it is dead and its number is free."""
        self.process.wait(PATIENCE)
        settled.reap_orphans()

    def ended(self) -> int:
        """The exit status of what was restored as it, which is our child after its worker has ended."""
        with pidfd_of(self.pid) as dead:
            assert wait_dead(dead, PATIENCE), self.output
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        """Kill what is in its session, also what was restored into it."""
        kill_session(self.pid)
        self.process.wait()
        settled.reap_orphans()


@dataclass(frozen=True)
class Outcome:
    """What came of a restore: the pid of the root, 0 if there is none; then the error."""
    root: int = 0
    error: CkptError | None = None
    warnings: tuple[Finding, ...] = ()

    @property
    def words(self) -> str:
        """All that was said, for messages."""
        rows = self.warnings if self.error is None else self.error.refusals
        return '; '.join([*filter(None, [str(self.error or '')]), *map(str, rows)])


class Call:
    """A child of the test that is a user and works for the test: `result()`, or await it where jobs ask the test."""

    def __init__(self, pid: int, reader: int) -> None:
        self.pid, self._reader = pid, reader

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self.over().__await__()
        return self.result()

    async def over(self) -> None:
        """Until the result is there."""
        await readable(self._reader)

    def result(self) -> Any:
        """What the work returned; raises what it raised."""
        assert select.select([self._reader], [], [], 3 * PATIENCE)[0], f'{self.pid} does not answer'
        with os.fdopen(self._reader, 'rb') as pipe:
            data = pipe.read()
        self._reader = -1
        os.waitpid(self.pid, 0)
        assert data, f'{self.pid} died'
        error, value = pickle.loads(data)
        if error is not None:
            raise error
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever did not wait for the result does not want it."""
        if self._reader >= 0:
            os.close(self._reader)
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@dataclass
class Attacker:
    """A user. address: the bus where the daemon is. before: what each child of this user does while it is root yet."""
    name: str
    uid: int
    groups: tuple[int, ...]
    home: Path
    address: str
    before: list[Callable[[], object]] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)

    # ------------------------------------------------------------ processes

    def start(self, source: str, name: str = '', *, env: dict[str, str] | None = None,
              argv: tuple[str | Path, ...] = (), inherit: tuple[int, ...] = ()) -> Program:
        """A program that is ready. source: Python, behind PRELUDE. argv: instead, a program that speaks as victims."""
        directory = self.home / (name or f'program{len(self.programs)}')
        directory.mkdir()
        if not argv:
            (directory / 'source.py').write_text(PRELUDE + source)
            argv = (PYTHON, '-I', '-S', '-B', directory / 'source.py')
        for fifo in ('go', 'answer'):
            os.mkfifo(directory / fifo)
        (directory / 'output').touch()
        for path in (directory, *directory.iterdir()):
            os.chown(path, self.uid, self.uid)
        ready, theirs = os.pipe()
        with (directory / 'output').open('wb') as output:
            process = subprocess.Popen(
                [*argv], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=directory,
                pass_fds=[theirs, *inherit], start_new_session=True, preexec_fn=self.become,
                env={'PATH': '/usr/bin:/bin', 'HOME': str(self.home), 'CKPTD_VICTIM_READY': str(theirs),
                     'CKPTD_VICTIM_GO': str(directory / 'go'), **(env or {})})
        self.programs.append(program := Program(process, directory))
        os.close(theirs)
        with os.fdopen(ready, 'rb') as pipe:
            # to its end: none of its children has the write end either
            line = read_line(pipe.fileno(), PATIENCE)
            assert line.endswith('\n'), f'{program.pid} is not ready:\n{program.output}'
            assert read_line(pipe.fileno(), PATIENCE) == '', 'it reported twice'
        return program

    def own(self, path: Path, content: bytes | None = None, mode: int = 0o755) -> Path:
        """A new directory, or a file with that content, of the user's."""
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        os.chown(path, self.uid, self.uid)
        path.chmod(mode)
        return path

    def become(self) -> None:
        """Have this process be the user, as a program that a login has started is."""
        for step in self.before:
            step()
        os.setgroups(self.groups)
        os.setresgid(self.uid, self.uid, self.uid)
        os.setresuid(self.uid, self.uid, self.uid)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)

    def begin(self, work: Callable[[], Any]) -> Call:
        """Do the work in a child that is this user, at home; it goes on meanwhile."""
        reader, writer = os.pipe()
        pid = fork()
        if pid == 0:
            try:
                os.close(reader)
                self.become()
                os.chdir(self.home)
                os.environ.update(HOME=str(self.home), PATH='/usr/bin:/bin')
                _answer(writer, work)
            finally:
                os._exit(1)
        os.close(writer)
        return Call(pid, reader)

    def do(self, work: Callable[[], T]) -> T:
        """The same, and its result."""
        result: T = self.begin(work).result()
        return result

    def close(self) -> None:
        for program in self.programs:
            program.close()

    # ------------------------------------------------------------ the bus

    def on_bus(self, work: Callable[[SyncCkptd], T]) -> T:
        """What the work returns, done with a client of this user's."""
        return self.do(lambda: self.connected(work))

    def connected(self, work: Callable[[SyncCkptd], T]) -> T:
        """The same in this process."""
        with connect(self.address) as ckptd:
            return work(ckptd)

    def checkpointing(self, program: Program, **options: Any) -> Call:
        """Ask for a checkpoint; the result of the call is the image's id."""
        return self.begin(lambda: self.connected(lambda ckptd: taken(ckptd, program, options)))

    def checkpoint(self, program: Program, **options: Any) -> str:
        """The id of its image; it is dead."""
        image: str = self.checkpointing(program, **options).result()
        program.wait_dead()
        return image

    def take(self, program: Program, **options: Any) -> ImageStream:
        """The image of a program, which is dead; the daemon has it no more."""
        def work(ckptd: SyncCkptd) -> bytes:
            image = ckptd.image(taken(ckptd, program, options))
            with os.fdopen(image.open(), 'rb') as stream:
                data = stream.read()
            image.remove()
            return data
        data = self.on_bus(work)
        program.wait_dead()
        return ImageStream.load(data)

    def bring(self, image: ImageStream) -> str:
        """Import an image; its id."""
        stream = image.dump()
        return self.on_bus(lambda ckptd: brought(ckptd, stream))

    def check_restore(self, image: str | ImageStream, **options: Any) -> list[Finding]:
        """What a dry run says."""
        stream = image.dump() if isinstance(image, ImageStream) else b''
        return self.on_bus(lambda ckptd: ckptd.check_restore(brought(ckptd, stream) or str(image), **options))

    def restoring(self, image: str | ImageStream, **options: Any) -> Call:
        """Ask for a restore of an image of the daemon's, or of one that is imported first; the result of the call is
        its Outcome."""
        stream = image.dump() if isinstance(image, ImageStream) else b''
        options = {'detach': True, **options}
        return self.begin(lambda: self.connected(lambda ckptd: outcome_of(
            lambda: ckptd.restore(brought(ckptd, stream) or str(image), **options))))

    def restore(self, image: str | ImageStream, **options: Any) -> Outcome:
        """The same, and what came of it."""
        outcome: Outcome = self.restoring(image, **options).result()
        return outcome


def taken(ckptd: SyncCkptd, program: Program, options: dict[str, Any]) -> str:
    """The id of a program's image, which was killed."""
    return ckptd.checkpoint(f'pid:{program.pid}', **{'after': 'kill', **options}).wait(PATIENCE).image


def brought(ckptd: SyncCkptd, stream: bytes) -> str:
    """The id of an image that is imported; none of no stream."""
    if not stream:
        return ''
    with tempfile.TemporaryFile() as file:
        file.write(stream)
        file.seek(0)
        return ckptd.import_image(file.fileno()).id


def outcome_of(begin: Callable[[], SyncJob[Any]]) -> Outcome:
    """Of a restore that `begin` asks for."""
    try:
        done = begin().wait(2 * PATIENCE)
    except CkptError as error:
        return Outcome(error=error)
    return Outcome(done.root, warnings=tuple(done.warnings))


def _answer(writer: int, work: Callable[[], Any]) -> None:
    """Send (error, value) to the parent."""
    try:
        answer = None, work()
    except Exception as error:  # noqa: BLE001 - the boundary of the process: the parent raises it
        error.add_note(traceback.format_exc())
        answer = error, None
    with os.fdopen(writer, 'wb') as pipe:
        pipe.write(pickle.dumps(answer))
    os._exit(0)


async def standing(gate: Gate, point: str, call: Call) -> Standing:
    """Whoever comes to a fault point while the call lasts."""
    comes, ends = asyncio.create_task(gate.stand(point)), asyncio.create_task(call.over())
    done, waiting = await asyncio.wait((comes, ends), return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.wait((comes, ends))
    assert comes in done, f'nobody came to {point}, but to {gate.passed}: {call.result()}'
    return comes.result()


def refused(outcome: Outcome) -> bool:
    """Whether there is no tree, for a reason that the user is told: rows that name what may not be, or one sentence."""
    if outcome.error is None:
        return False
    assert 'internal error' not in str(outcome.error), outcome.words
    return True


# ---------------------------------------------------------------- what /proc says

def status(pid: int, tid: int = 0) -> dict[str, str]:
    """Lines of /proc/PID/task/TID/status by name; of the leader where no thread is named."""
    text = Path(f'/proc/{pid}/task/{tid or pid}/status').read_text()
    return dict(line.split(':\t', 1) for line in text.splitlines() if ':\t' in line)


def threads(pid: int) -> list[int]:
    return [int(path.name) for path in Path(f'/proc/{pid}/task').iterdir()]


def place_of(pid: int) -> Path:
    """The directory of a process's cgroup, of version 2."""
    mount = cgroup2_mount()
    assert mount is not None, 'no cgroup2 is mounted'
    [name] = [line[3:] for line in Path(f'/proc/{pid}/cgroup').read_text().splitlines() if line.startswith('0::')]
    return mount / name.lstrip('/')


def is_frozen(cgroup: Path) -> bool:
    return 'frozen 1' in (cgroup / 'cgroup.events').read_text()


def tracees_of(tracer: int) -> list[tuple[int, int]]:
    """(pid, tid) of all tasks that a process traces."""
    found = []
    for path in Path('/proc').glob('[0-9]*/task/[0-9]*/status'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if f'\nTracerPid:\t{tracer}\n' in path.read_text(errors='replace'):
                found.append((int(path.parts[2]), int(path.parts[4])))
    return sorted(found)


def may_write(task: bytes) -> bool:
    """Whether this process may write to the memory of a task: PID, or PID/task/TID."""
    try:
        os.close(os.open(b'/proc/%s/mem' % task, os.O_RDWR))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def pidfd_of(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Whatever happens meanwhile: owner, mode and content of a file stay."""
    before, content = path.lstat(), path.read_bytes()
    yield
    after = path.lstat()
    for name in ('st_uid', 'st_gid', 'st_mode'):
        was, now = getattr(before, name), getattr(after, name)
        assert was == now, f'{name} of {path} was {was} ({was:#o}) and is {now} ({now:#o})'
    assert path.read_bytes() == content, f'{path} has another content'

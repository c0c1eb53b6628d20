# SPDX-License-Identifier: LGPL-2.1-or-later
"""One program is checkpointed, killed and restored. What /proc shows and what the program itself reports must be the
same before and after, or the checkpoint is refused with a reason."""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.errors import CkptError
from ckptd.kernel.mqueue import mq_unlink
from tests.fuzz.bases import User
from tests.fuzz.restoring import LoggedWorker
from tests.generated import attributes, files, memory, sockets, terminals  # noqa: F401 - they add operations
from tests.generated.programs import Operation, Program
from tests.lib import settled
from tests.lib.procdiff import Picture, changes_of_restart, differences, merged, take_picture
from tests.lib.victim import Victim, kill_session, states
from tests.worker.driver import Place

HERE = Path(__file__).parent
PATIENCE = 20.0         # seconds for what takes a moment
_INTERNAL = 'internal error'
O_TMPFILE, O_LARGEFILE = 0o20200000, 0o100000      # of fcntl.h
# a warning, and the differences that it announces
ANNOUNCED = {
    'is another terminal now': r'tty-index|/dev/pts|terminal-4',
    'a lock on .* is not kept': r'fd \d+ lock',
    'belonged to uid': r'fd\d+-stat',
    'the deleted .* is made in': r'(fd|maps) .*\(deleted\)',
    'O_NOFOLLOW of .* is not kept': r'fd \d+ flags|fd\d+-fcntl-3',
}
_OUT = re.compile(r'^(\d+) (before|after) (\S+) (.*)$', re.MULTILINE)


@functools.cache
def build() -> Path:
    """The compiled calls.c."""
    directory = HERE / 'build'
    directory.mkdir(exist_ok=True)
    with (directory / '.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make = subprocess.run(['make', '--no-print-directory', '-C', HERE],
                              capture_output=True, text=True, check=False)
    assert make.returncode == 0, make.stderr
    return directory / 'calls'


def prepared(steps: Sequence[Operation]) -> Program:
    """The program, which makes the files that it uses first."""
    program = Program()
    for name in (b'file', b'other'):
        file = program.call('open', name + b'\0', 0o102, 0o644)
        program.call('write', file, b'content.' * 50, 400)
        program.call('ftruncate', file, 30000)
        program.call('close', file)
    program.call('mkdir', b'directory\0', 0o755)
    program.call('mknod', b'fifo\0', 0o10644, 0)
    program.call('symlink', b'file\0', b'link\0')
    for one in steps:
        one.add_to(program)
    return program


@dataclass
class Outcome:
    """What came of a program: 'restored', 'checkpoint refused: ...', or 'died'. warnings: of checkpoint and restart.
    wrong: sentences about what must not be."""
    what: str = ''
    warnings: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Trial:
    """One run in a directory of its own, which is removed. user: an ordinary user, whose program and jobs it is."""

    def __init__(self, place: Place, directory: Path, steps: Sequence[Operation], user: User | None = None) -> None:
        self._place, self._directory, self._steps, self._user = place, directory, steps, user
        self.outcome = Outcome()

    def run(self) -> Outcome:
        self._directory.mkdir(mode=0o777)
        program = self._directory / 'program'
        program.write_text(prepared(self._steps).text)
        copy = Path(shutil.copy(build(), self._directory))      # the checkout may be where users cannot read it
        self._victim = Victim('calls', str(program), directory=self._directory / 'run', program=copy,
                              uid=self._user and self._user.caller.uid)
        try:
            self._start()
        finally:
            self._end()
        return self.outcome

    def _start(self) -> None:
        try:
            self._victim.start()
        except AssertionError:
            self.outcome.what = 'died'      # a signal or a limit ended it before it was ready
            return
        with self._told():
            self._restart()

    @contextlib.contextmanager
    def _told(self) -> Any:
        # with a reader nothing that is written to the FIFO is lost
        self._go = os.open(self._victim.fifo, os.O_RDWR)
        try:
            yield
        finally:
            os.close(self._go)

    def _restart(self) -> None:
        victim = self._victim
        before = self._report('before')
        picture = take(victim.pid)
        answer = self._do('checkpoint', victim.pid, after='kill')
        if answer is None:
            self.outcome.wrong += [f'after the refusal: {line}' for line in differences(picture, take(victim.pid))]
            return
        victim.process.wait()
        deadline = time.monotonic() + PATIENCE
        pids = {task for task, _, _ in picture.rows}
        while (left := [pid for pid in pids if Path(f'/proc/{pid}').exists()]) and time.monotonic() < deadline:
            settled.reap_orphans()
            os.sched_yield()
        if left:
            self.outcome.wrong.append(f'processes {left} were left by the checkpoint')
        image = str(answer['image'])
        if self._do('restore', 0, image=image) is not None:
            self.outcome.what = 'restored'
            self._await(lambda: 'R' not in states(victim.pid))
            found = changes_of_restart(picture, take(victim.pid))
            found += _differences(before, self._report('after'))
            self.outcome.wrong += [line for line in found if not self._is_announced(line)]
        shutil.rmtree(self._place.spool / image, ignore_errors=True)

    def _do(self, operation: str, pid: int, **more: Any) -> dict[str, Any] | None:
        """The answer; None after a refusal."""
        with LoggedWorker() as worker:
            try:
                if self._user:
                    more['caller'] = self._user.caller
                answer = worker.run(self._place.request(pid, operation=operation, **more))
                self.outcome.warnings += [str(row['reason']) for row in answer['warnings']]
                return answer
            except CkptError as error:
                self.outcome.what = f'{operation} refused: {error.name}'
                findings = [f'{row.get("reason")}' for row in getattr(error, 'findings', ())]
                self.outcome.what += f' {error.message} {findings}'
                if _INTERNAL in error.message or worker.log or error.name in ('WorkerDied', 'Failed') or not error.hint:
                    self.outcome.wrong.append('\n'.join((f'{operation}: {error.message} (hint: {error.hint})',
                                                         *worker.log)))
                elif operation == 'restore' and not any('may not be opened again' in one
                                                        for one in self.outcome.warnings):
                    self.outcome.wrong.append(f'restore: {error.message} (hint: {error.hint})')
            except (AssertionError, TimeoutError) as error:
                self.outcome.wrong.append(f'{operation}: {type(error).__name__} {error}')
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        return None

    def _is_announced(self, difference: str) -> bool:
        """Whether a warning of the checkpoint or of the restart has named it."""
        return any(re.search(pattern, difference) and any(re.search(warning, one) for one in self.outcome.warnings)
                   for warning, pattern in ANNOUNCED.items())

    # ------------------------------------------------------------ reports

    def _report(self, moment: str) -> dict[str, str]:
        """What each task says of itself."""
        count = sum(letter not in 'ZX' for letter in states(self._victim.pid))
        os.write(self._go, moment[:1].encode() * count)
        ends = 0

        def is_done() -> bool:
            nonlocal ends
            ends = len(re.findall(rf'^\d+ {moment} end$', self._victim.output, re.MULTILINE))
            return ends >= count
        if not self._await(is_done):
            self.outcome.wrong.append(f'{ends} of {count} tasks have reported {moment}')
        self._await(lambda: 'R' not in states(self._victim.pid))
        return {f'{tid} {what}': _without_flags(what, value)
                for tid, when, what, value in _OUT.findall(self._victim.output) if when == moment}

    def _await(self, condition: Any) -> bool:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                return False
            os.sched_yield()
        return True

    def _end(self) -> None:
        victim = self._victim
        if victim._process is not None:
            kill_session(victim.pid)
            victim.process.wait()
            deadline = time.monotonic() + PATIENCE
            kept = {self._user.asker} if self._user else set()
            while (left := {*settled.children()} - kept) and time.monotonic() < deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                settled.reap_orphans()
        self.outcome.wrong += [f'{path} was left' for path in self._place.freezes]
        self.outcome.wrong += [f'{path} was left' for path in self._place.spool.iterdir()]
        shutil.rmtree(self._directory, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            mq_unlink(files.QUEUE)


def take(pid: int) -> Picture:
    """The picture of a tree, with mappings merged that have one state: when the kernel merges depends on history. With
    the content of the memory that programs use."""
    picture = merged(take_picture(pid))
    window = memory.BASE, memory.BASE + 2 * memory.PAGES * memory.PAGE
    for (task, source, name), flags in [*picture.rows.items()]:
        start = int(name.partition('-')[0], 16) if source == 'maps flags' else 0
        # droppable memory may be gone at any time
        if window[0] <= start < window[1] and 'dp' not in flags.split():
            picture.add(task, 'content', name, _content(task, start, int(name.partition('-')[2], 16)))
    return picture


def _content(pid: int, start: int, end: int) -> str:
    """A digest of each page, '-' for one that cannot be read: guard regions, and pages behind the end of a file."""
    found = []
    with open(f'/proc/{pid}/mem', 'rb', buffering=0) as file:  # noqa: PTH123
        for address in range(start, end, memory.PAGE):
            try:
                found.append(f'{zlib.crc32(os.pread(file.fileno(), memory.PAGE, address)):x}')
            except OSError:
                found.append('-')
    return ' '.join(found)


def _differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [f'reported {what}: {before.get(what)} -> {after.get(what)}' for what in sorted(before | after)
            if before.get(what) != after.get(what)]


def _without_flags(what: str, value: str) -> str:
    """F_GETFL without O_TMPFILE, see procdiff, and O_LARGEFILE, which procdiff compares."""
    if not (what.startswith('fd') and what.endswith('-fcntl-3')):
        return value
    flags = int(value)
    return str(flags & ~O_LARGEFILE & ~(O_TMPFILE if flags & O_TMPFILE == O_TMPFILE else 0))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kills happen to: a bus, a daemon of root's, a user with a tree; and what of it is not as it must be."""

import contextlib
import errno
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ckptd.image.ids import is_image_id
from ckptd.kernel.stat import read_stat
from ckptd.kernel.status import read_status
from tests.lib import settled
from tests.lib.bus import Served
from tests.lib.systembus import USERS, SystemBus, children_of
from tests.lib.victim import VICTIMS
from tests.security.attacker import PATIENCE, Attacker, Program
from tests.security.attacker import place_of as cgroup_of
from tests.worker.driver import place_of

NAME = 'alice'
SPAWNER = b'ckptd.worker.spawner'
CFLAGS = ('-std=gnu11', '-O2', '-Wall', '-Wextra', '-Wno-missing-field-initializers', '-Werror', '-D_GNU_SOURCE',
          '-pthread')
OTHER_CONTENT = b'changed since' * 500      # of the file that a rollback puts back
TASKS = 17                                  # of tree.c


def build(directory: Path) -> Path:
    """The program tree.c, where the user may run it."""
    program = directory / 'tree'
    subprocess.run(['gcc', *CFLAGS, f'-I{VICTIMS}', '-o', program, Path(__file__).with_name('tree.c')], check=True)
    return program


def descendants(pid: int) -> list[int]:
    """Processes below one that may end meanwhile."""
    try:
        children = [child for task in Path(f'/proc/{pid}/task').iterdir()
                    for child in map(int, (task / 'children').read_text().split())]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return children + [one for child in children for one in descendants(child)]


def is_dead(pid: int, tid: int) -> bool:
    with suppress_gone():
        return read_stat(pid, tid).state in 'ZX'
    return True


def mounts_below(*directories: Path) -> list[str]:
    return [line for line in Path('/proc/self/mountinfo').read_text().splitlines()
            if any(Path(line.split()[4]).is_relative_to(directory) for directory in directories)]


@dataclass
class Tree:
    """The user's processes. home: their cgroup. tasks: (pid, tid) of all threads. image: of a tree that was killed."""
    program: Program
    home: Path
    tasks: set[tuple[int, int]] = field(default_factory=set)
    image: str = ''

    @property
    def root(self) -> int:
        return self.program.pid

    @property
    def processes(self) -> set[int]:
        return {pid for pid, _ in self.tasks}

    @property
    def file(self) -> Path:
        return self.program.directory / 'file'

    def look(self) -> Self:
        """Learn which tasks there are."""
        self.tasks = {(pid, int(task.name)) for pid in (self.root, *descendants(self.root))
                      for task in Path(f'/proc/{pid}/task').iterdir()}
        assert len(self.tasks) == TASKS, self.tasks
        return self

    def alive(self) -> set[tuple[int, int]]:
        return {task for task in self.tasks if not is_dead(*task)}

    def missing(self) -> list[str]:
        """What is wrong with a tree that is neither whole nor gone."""
        alive = self.alive()
        if alive == self.tasks:
            return []
        if not alive:
            return [f'process {pid} is dead and has its number still' for pid in sorted(self.processes)
                    if Path(f'/proc/{pid}').exists()]
        return [f'of the tasks {sorted(self.tasks)} there are only {sorted(alive)}']

    def stops(self) -> list[str]:
        """What keeps a task from running at home."""
        found = []
        for pid, tid in sorted(self.alive()):
            with suppress_gone():
                status, place = read_status(pid, tid), cgroup_of(pid)
                if status.state in 'Tt':
                    found.append(f'task {pid}/{tid} is in state {status.state}')
                if status.tracer_pid:
                    found.append(f'task {pid}/{tid} is traced by {status.tracer_pid}')
                if 'frozen 1' in (place / 'cgroup.events').read_text():
                    found.append(f'task {pid}/{tid} is frozen')
                if place != self.home:
                    found.append(f'task {pid}/{tid} is in {place}, not in {self.home}')
        return found

    def check_itself(self) -> str:
        """Have it check itself and end; what it says against that."""
        self.program.go()
        pidfd = os.pidfd_open(self.root)
        try:
            if not select.select([pidfd], [], [], PATIENCE)[0]:
                return 'the tree does not end'
        finally:
            os.close(pidfd)
        _, status = os.waitpid(self.root, 0)
        code = os.waitstatus_to_exitcode(status)
        return f'the tree ended with {code}: {self.program.output}' if code else ''


class Stage:
    """`with Stage(directory, own_cgroup)`; the calling process is a subreaper and alone in that cgroup."""

    def __init__(self, directory: Path, cgroup: Path) -> None:
        self.cgroup, self._directory = cgroup, directory
        self._stack = contextlib.ExitStack()
        self._number = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.bus = stack.enter_context(SystemBus(self._directory))
            home = stack.enter_context(place_of(USERS[NAME]))
            self.program = build(home.parent)
            self.user = Attacker(NAME, USERS[NAME], (USERS[NAME],), home, self.bus.address)
            self.spool = self._directory / 'spool'
            self.spool.mkdir(mode=0o700)
            self.start_daemon()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._stack:
            assert self.daemon.stop() in (0, -signal.SIGKILL), self.daemon.log

    # ------------------------------------------------------------ the daemon

    def start_daemon(self) -> None:
        """A new one, of the same directories."""
        self.daemon = Served(self.bus.address, self._directory, self.spool).start()

    @property
    def spawner(self) -> int:
        """0 where there is none."""
        for pid in children_of(self.daemon.pid):
            with suppress_gone():
                if SPAWNER in Path(f'/proc/{pid}/cmdline').read_bytes():
                    return pid
        return 0

    # ------------------------------------------------------------ trees

    @contextlib.contextmanager
    def tree(self, *, alone: bool) -> Iterator[Tree]:
        """A new one. alone: in a cgroup of its own, which can be frozen as it is."""
        self._number += 1
        home = self.cgroup
        if alone:
            home = self.cgroup / 'target'
            home.mkdir()
        self.user.before.append(lambda: (home / 'cgroup.procs').write_text('0'))
        try:
            program = self.user.start('', f'tree{self._number}', argv=(self.program,))
        finally:
            self.user.before.clear()
        self.user.programs.clear()
        try:
            yield Tree(program, home).look()
        finally:
            program.close()
            shutil.rmtree(program.directory)
            if alone:
                settled.remove_cgroup(home)

    def reap(self, *others: int) -> None:
        """What was orphaned and is dead, but for these."""
        settled.reap([pid for pid in settled.children() if pid not in others and settled.is_zombie(pid)])

    # ------------------------------------------------------------ what must not be

    def left_over(self, tree: Tree, *known: int) -> list[str]:
        """What is there of ckptd but the daemon and its spawner. known: processes of the test."""
        spawner = self.spawner
        mine = {os.getpid(), self.bus.pid, self.daemon.pid, spawner, *tree.processes, *known}
        groups = self._groups()
        found = [f'process {settled.describe(pid)} is left' for group in groups for pid in _procs(group)
                 if pid not in mine]
        found += [f'{pid} is a child of the spawner' for pid in (descendants(spawner) if spawner else ())]
        found += [f'cgroup {path} is left' for path in groups if path not in (self.cgroup, tree.home)]
        found += [f'cgroup {path} is frozen' for path in groups if _is_frozen(path)]
        freezes = self.daemon.runtime / 'freezes'
        for path in freezes.iterdir() if freezes.exists() else ():
            with suppress_gone():
                found.append(f'journal entry {path.name} is left: {path.read_text()}')
        found += [f'{path.name} is left in the spool' for path in self.spool.iterdir() if not is_image_id(path.name)]
        found += [f'{path} is locked' for path in (freezes, *self.spool.iterdir()) if settled.is_locked(path)]
        found += [f'mount {line} is left' for line in mounts_below(self._directory, self.user.home, self.cgroup)]
        return found

    def _groups(self) -> list[Path]:
        """Ours and those below. One that is removed meanwhile is left out."""
        return [Path(path) for path, _, _ in os.walk(self.cgroup)]

    def images(self) -> list[str]:
        return sorted(path.name for path in self.spool.iterdir() if is_image_id(path.name))

    def forget_images(self) -> None:
        for image in self.images():
            shutil.rmtree(self.spool / image)

    def reset(self) -> None:
        """After a failure: a new daemon, and nothing of what was."""
        self.daemon.process.kill()
        self.daemon.process.wait()
        for path in reversed(self._groups()):
            if path not in (self.cgroup, self.cgroup / 'target'):       # that of a tree has an owner
                settled.remove_cgroup(path)
        for pid in settled.children():
            if pid != self.bus.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for path in (*self.spool.iterdir(), *(self.daemon.runtime / 'freezes').iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.start_daemon()


@contextlib.contextmanager
def suppress_gone() -> Iterator[None]:
    """Of a process or cgroup that is no more by the time that it is looked at there is nothing to say."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH, errno.ENODEV):
            raise


def _procs(group: Path) -> list[int]:
    with suppress_gone():
        return [int(pid) for pid in (group / 'cgroup.procs').read_text().split()]
    return []


def _is_frozen(group: Path) -> bool:
    with suppress_gone():
        return (group / 'cgroup.freeze').read_text().strip() == '1'
    return False

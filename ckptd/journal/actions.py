# SPDX-License-Identifier: LGPL-2.1-or-later
"""Take and undo each step of the journal, with the same code for success, failure and recovery."""

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import NoReturn

from ckptd.errors import CkptError
from ckptd.journal.entry import JournalEntry
from ckptd.journal.files import as_maker, put_back, remove_segment, unmake
from ckptd.journal.steps import (
    AnyStep,
    Born,
    EndProcesses,
    FreezeCgroup,
    FreezeUnit,
    KeepFile,
    Known,
    MakeCgroup,
    MakeFile,
    MakeHome,
    MakeSegment,
    Move,
    Moved,
    ThawUnit,
)
from ckptd.kernel.cgroup import Cgroup, CgroupMount
from ckptd.kernel.pidfd import open_process, pidfd_send_signal, wait_dead
from ckptd.kernel.stat import PF_EXITING, read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2, read_threads

UnitCall = Callable[[str], None]
FaultPoint = Callable[[str], None]

ROUNDS = 64                 # of moving what is in a cgroup; in a frozen one nothing is born, so two are the rule
EMPTY_SECONDS = 5.0         # how long a killed process may take to leave its cgroup
GONE = (errno.ENOENT, errno.ENODEV)


def no_fault(point: str) -> None:
    """The fault point of those who inject none."""


@dataclass(frozen=True, slots=True)
class Actions:
    """The targets of steps. freeze_unit, thaw_unit: ask systemd; OSError or CkptError when it does not do it."""
    mount: CgroupMount | None
    freeze_unit: UnitCall | None = None
    thaw_unit: UnitCall | None = None

    def cgroup(self, name: str) -> Cgroup:
        """The cgroup of a name in /proc/PID/cgroup. FileNotFoundError if no mount shows it."""
        if self.mount is None:
            raise FileNotFoundError(errno.ENOENT, 'no cgroup v2 hierarchy is mounted', name)
        return Cgroup(self.mount.directory(name))

    def name_of(self, cgroup: Cgroup) -> str:
        """The opposite of `cgroup`."""
        if self.mount is None:
            raise FileNotFoundError(errno.ENOENT, 'no cgroup v2 hierarchy is mounted')
        return str(PurePosixPath(self.mount.root) / cgroup.path.relative_to(self.mount.path))

    # ------------------------------------------------------------ take

    def take(self, step: AnyStep) -> None:
        """Change the system. Processes that died meanwhile are passed over; else OSError."""
        match step:
            case MakeCgroup(cgroup):
                path = PurePosixPath(cgroup)
                self.cgroup(str(path.parent)).create(path.name)
            case FreezeCgroup(cgroup):
                self.cgroup(cgroup).freeze()
            case Move(to, processes):
                for process in processes:
                    self._move(process, self.cgroup(to))
            case FreezeUnit(unit):
                (self.freeze_unit or _no_systemd)(unit)
            case ThawUnit(unit):
                (self.thaw_unit or _no_systemd)(unit)
            case MakeHome(cgroup):
                self.cgroup(cgroup).path.mkdir(parents=True, exist_ok=True)
            case Born() | MakeSegment() | MakeFile() | KeepFile() | EndProcesses():
                return      # whoever wrote it down does it

    def _move(self, process: Moved, work: Cgroup) -> None:
        """A process is moved by its number alone, which may be another process's by now: that one goes back at once."""
        try:
            before = self.cgroup(read_cgroup2(process.pid) or '/')
            work.attach(process.pid)
            if read_stat(process.pid).start_time != process.start_time:
                before.attach(process.pid)
        except ProcessLookupError:
            return      # died; its cgroup forgets it by itself

    # ------------------------------------------------------------ undo

    def undo(self, step: AnyStep, origins: Mapping[int, Moved]) -> None:
        """The opposite, also if the step was not taken, or undone before. origins: `Entry.origins`."""
        try:
            self._undo(step, origins)
        except OSError as error:
            if error.errno not in GONE:     # a cgroup that is no more keeps nothing frozen
                raise

    def _undo(self, step: AnyStep, origins: Mapping[int, Moved]) -> None:
        match step:
            case MakeCgroup(cgroup):
                self._bring_back(self.cgroup(cgroup), dict(origins))
                _remove(self.cgroup(cgroup))
            case FreezeCgroup(cgroup):
                _thaw(self.cgroup(cgroup))
            case Move(to):
                self._bring_back(self.cgroup(to), dict(origins))
            case FreezeUnit(unit):
                (self.thaw_unit or _no_systemd)(unit)
            case ThawUnit(unit):
                (self.freeze_unit or _no_systemd)(unit)
            case MakeHome(cgroup):
                self._remove_empty(self.cgroup(cgroup))
            case Born(cgroup):
                self._end(self.cgroup(cgroup))
            case EndProcesses(processes):
                _end_processes(processes)
            case MakeSegment():
                as_maker(step, partial(remove_segment, step))
            case MakeFile():
                as_maker(step, partial(unmake, step))
            case KeepFile(kept=path):
                kept = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    as_maker(step, partial(put_back, step, kept))
                finally:
                    os.close(kept)

    def _end(self, born: Cgroup) -> None:
        """Kill what is in a cgroup, frozen or not, and see it gone: zombies are in no cgroup."""
        for pid in born.procs(recursive=True):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        born.wait_empty(time.monotonic() + EMPTY_SECONDS)

    def _remove_empty(self, home: Cgroup) -> None:
        """This cgroup and those above it, as far as nobody is in them."""
        at: Cgroup | None = home
        while at is not None and at.exists:
            try:
                at.remove()
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                    return
                raise
            at = at.parent

    def _bring_back(self, work: Cgroup, origins: dict[int, Moved]) -> None:
        """Empty a work cgroup: each process to where it was, one that was born there to where its parent was."""
        work.freeze()           # or a tree that forks could outrun us
        for number in range(ROUNDS):
            inside = _processes_by_thread(work) if number else work.procs(recursive=True)
            if number > 1:      # what exits cannot be moved any more, and leaves by itself: `_remove` waits for it
                inside = [pid for pid in inside if not _is_dying(pid)]
            if number and not inside:
                return
            for pid in inside:
                self._send_home(pid, origins, work)
        raise OSError(errno.EBUSY, f'cannot empty the cgroup {work.path}')

    def _send_home(self, pid: int, origins: dict[int, Moved], work: Cgroup) -> None:
        try:
            stat = read_stat(pid)
        except ProcessLookupError:
            return
        known = origins.get(pid)
        if known is None or known.start_time != stat.start_time:
            parent = origins.get(stat.ppid) or next(iter(origins.values()), None)
            home = parent.cgroup if parent else str(PurePosixPath(self.name_of(work)).parent)
            known = origins[pid] = Moved(pid, stat.start_time, home)
        _attach(self._nearest(known.cgroup), pid)

    def _nearest(self, name: str) -> Cgroup:
        """The cgroup, or if it was removed meanwhile the next one above it."""
        path = PurePosixPath(name)
        return next(cgroup for above in (path, *path.parents) if (cgroup := self.cgroup(str(above))).exists)


def undo_all(entry: JournalEntry, actions: Actions, at: FaultPoint = no_fault) -> list[str]:
    """Undo what stands, newest first; one sentence for each step that could not be. The entry is deleted if all was.

    A tree that is not alive yet, or not to live any more, is ended before all else: at home, where it would be brought
    next, it would run.
    """
    origins, failures, needed = entry.origins(), [], set[str]()
    for _, step in sorted(entry.standing(), key=lambda one: not isinstance(one[1], Born | EndProcesses)):
        if isinstance(step, MakeFile) and step.path in needed:
            continue
        try:
            at(f'undo-{step.point}')
            actions.undo(step, origins)
        except (OSError, CkptError) as error:
            if isinstance(step, KeepFile):
                needed.add(step.kept)       # the only place where its content is
            failures.append(f'cannot undo {describe(step)}: {error}')
    if not failures:
        entry.finish()
    return failures


def describe(step: AnyStep) -> str:
    """For a person: 'freezing cgroup /a'."""
    match step:
        case MakeCgroup(cgroup):
            return f'making cgroup {cgroup}'
        case FreezeCgroup(cgroup):
            return f'freezing cgroup {cgroup}'
        case Move(to, processes):
            return f'moving {len(processes)} processes to cgroup {to}'
        case FreezeUnit(unit):
            return f'freezing unit {unit}'
        case ThawUnit(unit):
            return f'thawing unit {unit}'
        case MakeHome(cgroup):
            return f'making cgroup {cgroup}'
        case Born(cgroup):
            return f'restoring a tree in cgroup {cgroup}'
        case EndProcesses(processes):
            return f'ending {len(processes)} processes'
        case MakeSegment(shmid):
            return f'making System V segment {shmid}'
        case MakeFile(path):
            return f'making file {path}'
        case KeepFile(path=path, kept=kept):
            return f'rolling back {path}, whose content is in {kept}'


def _processes_by_thread(cgroup: Cgroup) -> list[int]:
    """List processes by their living threads. If the leader of a process has exited, cgroup.procs lists the process
    where the leader died, but only its living threads are moved (css_task_iter_advance in kernel/cgroup/cgroup.c)."""
    found = set()
    for tid in cgroup.threads(recursive=True):
        with suppress(ProcessLookupError):
            found.add(read_status(tid).tgid)
    return sorted(found)


def _is_dying(pid: int) -> bool:
    try:
        return all(read_stat(pid, tid).flags & PF_EXITING for tid in read_threads(pid))
    except ProcessLookupError:
        return True


def _end_processes(processes: Sequence[Known]) -> None:
    """Kill them all, then see them dead."""
    for process in processes:
        _with_pidfd(process, lambda pidfd: pidfd_send_signal(pidfd, signal.SIGKILL))
    deadline = time.monotonic() + EMPTY_SECONDS
    for process in processes:
        _with_pidfd(process, lambda pidfd: wait_dead(pidfd, deadline - time.monotonic()))


def _with_pidfd(process: Known, work: Callable[[int], object]) -> None:
    """Do the work with a pidfd of a process; nothing if it has exited."""
    with suppress(ProcessLookupError):
        pidfd = open_process(process.pid, process.start_time)
        try:
            work(pidfd)
        finally:
            os.close(pidfd)


def _thaw(cgroup: Cgroup) -> None:
    try:
        cgroup.thaw()
    except PermissionError:
        if cgroup.frozen_wanted:
            raise       # else the freeze was not permitted either, and there is nothing to undo


def _attach(cgroup: Cgroup, pid: int) -> None:
    try:
        cgroup.attach(pid)
    except ProcessLookupError:
        return      # died; its cgroup forgets it by itself


def _remove(cgroup: Cgroup) -> None:
    try:
        cgroup.remove()
    except OSError as error:
        # a process that was killed is in its cgroup until it has let go of its memory
        if error.errno != errno.EBUSY or not cgroup.wait_empty(time.monotonic() + EMPTY_SECONDS):
            raise
        cgroup.remove()


def _no_systemd(unit: str) -> NoReturn:
    raise OSError(errno.EOPNOTSUPP, f'no systemd to ask for {unit}')

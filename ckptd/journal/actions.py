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
from ckptd.journal.sockets import set_old_offsets
from ckptd.journal.steps import (
    AnyStep,
    Born,
    EndProcesses,
    FreezeCgroup,
    FreezeUnit,
    KeepFile,
    Known,
    LinkFile,
    MakeCgroup,
    MakeFile,
    MakeHome,
    MakeSegment,
    Move,
    Moved,
    ThawUnit,
    WalkQueues,
)
from ckptd.kernel.cgroup import Cgroup, CgroupMount
from ckptd.kernel.pidfd import open_process, pidfd_send_signal, wait_dead
from ckptd.kernel.stat import PF_EXITING, read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2, read_threads

UnitCall = Callable[[str], None]
FaultPoint = Callable[[str], None]

ROUNDS = 64                 # of moving the processes of a cgroup; none is born in a frozen one, so two are usually
                            # enough
EMPTY_SECONDS = 5.0         # time for a killed process to leave its cgroup
GONE = (errno.ENOENT, errno.ENODEV)


def no_fault(point: str) -> None:
    """Do nothing at a fault point."""


@dataclass(frozen=True, slots=True)
class Actions:
    """Actions for the steps. freeze_unit, thaw_unit: ask systemd; OSError or CkptError if it fails."""
    mount: CgroupMount | None
    freeze_unit: UnitCall | None = None
    thaw_unit: UnitCall | None = None

    def cgroup(self, name: str) -> Cgroup:
        """Return the cgroup of a name in /proc/PID/cgroup. FileNotFoundError if no mount shows it."""
        if self.mount is None:
            raise FileNotFoundError(errno.ENOENT, 'no cgroup v2 hierarchy is mounted', name)
        return Cgroup(self.mount.directory(name))

    def name_of(self, cgroup: Cgroup) -> str:
        """Return the name of a cgroup as in /proc/PID/cgroup."""
        if self.mount is None:
            raise FileNotFoundError(errno.ENOENT, 'no cgroup v2 hierarchy is mounted')
        return str(PurePosixPath(self.mount.root) / cgroup.path.relative_to(self.mount.path))

    # ------------------------------------------------------------ take

    def take(self, step: AnyStep) -> None:
        """Take a step: change the system. Processes that died meanwhile are skipped. OSError for other failures."""
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
            case Born() | MakeSegment() | MakeFile() | KeepFile() | LinkFile() | EndProcesses() | WalkQueues():
                return      # the code that wrote the step takes it

    def _move(self, process: Moved, work: Cgroup) -> None:
        """Move a process. A move uses the pid alone, which may have been reused: then that process is moved back at
        once."""
        try:
            before = self.cgroup(read_cgroup2(process.pid) or '/')
            work.attach(process.pid)
            if read_stat(process.pid).start_time != process.start_time:
                before.attach(process.pid)
        except ProcessLookupError:
            return      # it died, and its cgroup drops it

    # ------------------------------------------------------------ undo

    def undo(self, step: AnyStep, origins: Mapping[int, Moved]) -> None:
        """Undo a step, even if it was not taken, or was undone before. origins: `Entry.origins`."""
        try:
            self._undo(step, origins)
        except OSError as error:
            if error.errno not in GONE:     # a cgroup that was removed keeps nothing frozen
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
            case WalkQueues():
                as_maker(step, partial(set_old_offsets, step))
            case MakeSegment():
                as_maker(step, partial(remove_segment, step))
            case MakeFile():
                as_maker(step, partial(unmake, step))
            case LinkFile(image=image):
                if not os.path.lexists(image):      # if it exists, the image is published and has the name
                    as_maker(step, partial(unmake, step))
            case KeepFile(kept=path):
                kept = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    as_maker(step, partial(put_back, step, kept))
                finally:
                    os.close(kept)

    def _end(self, born: Cgroup) -> None:
        """Kill everything in a cgroup, frozen or not, and wait until it is empty. Zombies are in no cgroup."""
        for pid in born.procs(recursive=True):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        born.wait_empty(time.monotonic() + EMPTY_SECONDS)

    def _remove_empty(self, home: Cgroup) -> None:
        """Remove this cgroup and those above it, as long as they are empty."""
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
        """Empty a work cgroup. Each process goes back to its cgroup; one that was born here goes to its parent's."""
        work.freeze()           # otherwise a tree that forks could be faster
        for number in range(ROUNDS):
            inside = _processes_by_thread(work) if number else work.procs(recursive=True)
            # an exiting process can no longer be moved, and leaves by itself: `_remove` waits for it
            if number > 1:
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
        """Return the cgroup or, if it was removed meanwhile, the next one above it."""
        path = PurePosixPath(name)
        return next(cgroup for above in (path, *path.parents) if (cgroup := self.cgroup(str(above))).exists)


def undo_all(entry: JournalEntry, actions: Actions, at: FaultPoint = no_fault) -> list[str]:
    """Undo the standing steps, newest first. Return one sentence for each failure. The entry is deleted if there is
    none.

    A tree that does not live yet, or is to be ended, is ended first. Otherwise the undo would move it home, where it
    would run.
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
                needed.add(step.kept)       # the only copy of the file's content
            failures.append(f'cannot undo {describe(step)}: {error}')
    if not failures:
        entry.finish()
    return failures


def describe(step: AnyStep) -> str:
    """Describe a step for people: 'freezing cgroup /a'."""
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
        case WalkQueues(_, offsets):
            return f'walking the queues of {len(offsets)} sockets'
        case LinkFile(path):
            return f'giving a deleted file the name {path}'
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
    """Kill all processes, then wait until they are dead."""
    for process in processes:
        _with_pidfd(process, lambda pidfd: pidfd_send_signal(pidfd, signal.SIGKILL))
    deadline = time.monotonic() + EMPTY_SECONDS
    for process in processes:
        _with_pidfd(process, lambda pidfd: wait_dead(pidfd, deadline - time.monotonic()))


def _with_pidfd(process: Known, work: Callable[[int], object]) -> None:
    """Do the work with a pidfd of a process. Do nothing if it has exited."""
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
            raise       # otherwise the freeze was not permitted either, and there is nothing to undo


def _attach(cgroup: Cgroup, pid: int) -> None:
    try:
        cgroup.attach(pid)
    except ProcessLookupError:
        return      # it died, and its cgroup drops it


def _remove(cgroup: Cgroup) -> None:
    try:
        cgroup.remove()
    except OSError as error:
        # a killed process stays in its cgroup until its memory is released
        if error.errno != errno.EBUSY or not cgroup.wait_empty(time.monotonic() + EMPTY_SECONDS):
            raise
        cgroup.remove()


def _no_systemd(unit: str) -> NoReturn:
    raise OSError(errno.EOPNOTSUPP, f'no systemd for unit {unit}')

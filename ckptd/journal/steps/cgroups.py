# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps that make and freeze cgroups and move processes."""

import errno
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath

from ckptd.journal.steps.base import (
    EMPTY_SECONDS,
    CgroupName,
    Lifetime,
    Moved,
    Step,
    StepContext,
    WorkName,
)
from ckptd.kernel.cgroup import Cgroup
from ckptd.kernel.stat import PF_EXITING, read_stat
from ckptd.kernel.status import read_status
from ckptd.kernel.task import read_cgroup2, read_threads

ROUNDS = 64                 # of moving the processes of a cgroup; none is born in a frozen one, so two are usually
                            # enough


class MakeCgroup(Step, frozen=True):
    """Make a cgroup for the time of the freeze."""
    point = 'make'
    cgroup: WorkName

    def describe(self) -> str:
        return f'making cgroup {self.cgroup}'

    def take(self, context: StepContext) -> None:
        path = PurePosixPath(self.cgroup)
        context.cgroup(str(path.parent)).create(path.name)

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        _bring_back(context, self.cgroup, origins)
        _remove(context.cgroup(self.cgroup))


class FreezeCgroup(Step, frozen=True):
    """Write 1 to the cgroup.freeze of a cgroup that had 0 there."""
    point = 'freeze'
    stops_tree = True
    cgroup: CgroupName

    def describe(self) -> str:
        return f'freezing cgroup {self.cgroup}'

    def take(self, context: StepContext) -> None:
        context.cgroup(self.cgroup).freeze()

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        cgroup = context.cgroup(self.cgroup)
        try:
            cgroup.thaw()
        except PermissionError:
            if cgroup.frozen_wanted:
                raise       # otherwise the freeze was not permitted either, and there is nothing to undo


class Move(Step, frozen=True):
    """Move processes to a cgroup made by the freeze."""
    point = 'move'
    to: WorkName
    processes: tuple[Moved, ...]

    def describe(self) -> str:
        return f'moving {len(self.processes)} processes to cgroup {self.to}'

    def take(self, context: StepContext) -> None:
        for process in self.processes:
            _move(context, process, context.cgroup(self.to))

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        _bring_back(context, self.to, origins)


class MakeHome(Step, frozen=True):
    """Make a cgroup, and the missing ones above it, in which a restored tree stays."""
    point = 'make-home'
    lifetime = Lifetime.TREE
    cgroup: CgroupName

    def describe(self) -> str:
        return f'making cgroup {self.cgroup}'

    def take(self, context: StepContext) -> None:
        context.cgroup(self.cgroup).path.mkdir(parents=True, exist_ok=True)

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        """Remove this cgroup and those above it, as long as they are empty."""
        at: Cgroup | None = context.cgroup(self.cgroup)
        while at is not None and at.exists:
            try:
                at.remove()
            except OSError as error:
                if error.errno in (errno.EBUSY, errno.ENOTEMPTY):
                    return
                raise
            at = at.parent


class Born(Step, frozen=True):
    """Restore a tree in this cgroup. The step is undone by ending the tree, as long as it does not live yet."""
    point = 'born'
    ends_tree = True
    lifetime = Lifetime.TREE
    cgroup: CgroupName

    def describe(self) -> str:
        return f'restoring a tree in cgroup {self.cgroup}'

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        """Kill everything in the cgroup, frozen or not, and wait until it is empty. Zombies are in no cgroup."""
        born = context.cgroup(self.cgroup)
        for pid in born.procs(recursive=True):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        born.wait_empty(time.monotonic() + EMPTY_SECONDS)


# ---------------------------------------------------------------- move

def _move(context: StepContext, process: Moved, work: Cgroup) -> None:
    """Move a process. A move uses the pid alone, which may have been reused: then that process is moved back at
    once."""
    try:
        before = context.cgroup(read_cgroup2(process.pid) or '/')
        work.attach(process.pid)
        if read_stat(process.pid).start_time != process.start_time:
            before.attach(process.pid)
    except ProcessLookupError:
        return      # it died, and its cgroup drops it


def _bring_back(context: StepContext, name: str, origins: Mapping[int, Moved]) -> None:
    """Empty a work cgroup. Each process goes back to its cgroup; one that was born here goes to its parent's."""
    work, known = context.cgroup(name), dict(origins)
    work.freeze()           # otherwise a tree that forks could be faster
    for number in range(ROUNDS):
        inside = _processes_by_thread(work) if number else work.procs(recursive=True)
        # an exiting process can no longer be moved, and leaves by itself: `_remove` waits for it
        if number > 1:
            inside = [pid for pid in inside if not _is_dying(pid)]
        if number and not inside:
            return
        for pid in inside:
            _send_home(context, pid, known, work)
    raise OSError(errno.EBUSY, f'cannot empty the cgroup {work.path}')


def _send_home(context: StepContext, pid: int, origins: dict[int, Moved], work: Cgroup) -> None:
    try:
        stat = read_stat(pid)
    except ProcessLookupError:
        return
    known = origins.get(pid)
    if known is None or known.start_time != stat.start_time:
        parent = origins.get(stat.ppid) or next(iter(origins.values()), None)
        home = parent.cgroup if parent else str(PurePosixPath(context.name_of(work)).parent)
        known = origins[pid] = Moved(pid, stat.start_time, home)
    try:
        _nearest(context, known.cgroup).attach(pid)
    except ProcessLookupError:
        return      # it died, and its cgroup drops it


def _nearest(context: StepContext, name: str) -> Cgroup:
    """Return the cgroup or, if it was removed meanwhile, the next one above it."""
    path = PurePosixPath(name)
    return next(cgroup for above in (path, *path.parents) if (cgroup := context.cgroup(str(above))).exists)


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


def _remove(cgroup: Cgroup) -> None:
    try:
        cgroup.remove()
    except OSError as error:
        # a killed process stays in its cgroup until its memory is released
        if error.errno != errno.EBUSY or not cgroup.wait_empty(time.monotonic() + EMPTY_SECONDS):
            raise
        cgroup.remove()

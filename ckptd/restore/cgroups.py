# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroups of a restored tree during its birth and afterwards.

    born in     HOME/ckptd-JOB-RANDOM, a cgroup of its own, where one can be made
    starts      frozen there: each task is released, and only then, in one write, all of them are thawed
    lives in    the requested cgroup, else the former one of each process; for a unit that is no longer loaded systemd
                makes a scope, and without systemd a missing cgroup is made again

The journal has each step. Until the line is written that marks the tree as alive, a recovery ends the tree; afterwards
it moves the tree to its cgroups. So in the end all of it runs, or nothing.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, Self

from ckptd.errors import CkptError, Finding
from ckptd.faults import fault
from ckptd.image.files import spooling
from ckptd.journal.entry import JournalEntry
from ckptd.journal.steps import (
    AnyStep,
    Born,
    FreezeCgroup,
    Lifetime,
    MakeCgroup,
    MakeFile,
    MakeHome,
    Move,
    Moved,
    RestartStep,
    StepContext,
)
from ckptd.journal.store import Journal
from ckptd.kernel.cgroup import mount_of
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2
from ckptd.operation.broker import BrokerClient
from ckptd.operation.context import JobContext
from ckptd.protocol.broker_calls import Placed
from ckptd.protocol.requests import RestoreRequest
from ckptd.restore.creation_order import NewProcess

KEPT = '.kept-'     # files of the spool
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Placement(Protocol):
    """The cgroups of a restored tree, and the journal of what is made for it; see BirthCgroup."""
    cgroup_fd: int
    warnings: list[Finding]

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def want(self, cgroups: Mapping[int, str]) -> None: ...
    def prepare(self) -> None: ...
    def note(self, step: RestartStep) -> None: ...
    def keep_content(self) -> tuple[str, int]: ...
    def settle(self, pids: Mapping[int, int]) -> None: ...
    def lift_barrier(self) -> None: ...


class BirthCgroup:
    """The cgroups and the journal entry of a restart. If the `with` fails, everything is undone.

    want: the later cgroup of each process. cgroup_fd: the cgroup for the birth, -1 for ours.
    """

    def __init__(self, job: JobContext[RestoreRequest]) -> None:
        self._job = job
        self._context = StepContext(mount_of(read_mountinfo()))
        self._wanted: dict[int, str] = {}
        self._slice: str | None = None
        self._entry: JournalEntry = Journal(Path(job.request.runtime)).begin(job.request.job,
                                                                             f'image {job.request.image}',
                                                                             'restore')
        self._barrier = ''             # the cgroup that all processes are in when they start
        self.cgroup_fd = -1
        self.warnings: list[Finding] = []

    def __enter__(self) -> Self:
        return self

    def want(self, cgroups: Mapping[int, str], slice_: str | None = None) -> None:
        """Set the cgroup of each living process, by a number of its own; '' for none. slice_: of a scope that systemd
        is to make for them, '' for its default. With None, a scope is made only for processes whose cgroup is
        missing."""
        asked = self._job.request.cgroup
        self._wanted = {number: asked or cgroup for number, cgroup in cgroups.items()}
        self._slice = slice_

    def __exit__(self, *_: object) -> None:
        if self.cgroup_fd >= 0:
            os.close(self.cgroup_fd)
            self.cgroup_fd = -1
        if not self._entry.closed:
            self._undo()

    # ------------------------------------------------------------ before the birth

    def prepare(self) -> None:
        """Make the cgroup for the birth. If that is not possible, the tree is born and starts without one."""
        for home in sorted(set(self._wanted.values()) - {''}):
            if not self._exists(home) and not self._job.request.systemd:
                self._make_home(home)
        base = next((home for home in self._wanted.values() if home and self._exists(home)), '')
        base = base or read_cgroup2(os.getpid())
        if not base or '/..' in base:
            return
        work = str(PurePosixPath(base) / self._entry.work_name)
        try:
            self._take(MakeCgroup(work))
            self.cgroup_fd = os.open(self._context.cgroup(work).path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if self._job.request.cgroup:
                raise CkptError(f'cannot make a cgroup in {base}: {error.strerror}', errno=error.errno, resource=base,
                                phase='open', hint='choose a writable one with --cgroup') from error
            return
        self._barrier = work
        self._entry.add(Born(work))

    def _make_home(self, home: str) -> None:
        try:
            self._take(MakeHome(home))
        except FileNotFoundError:
            return      # no mount of cgroup v2 shows it
        except PermissionError:
            # the plan has warned about it: its processes live in our cgroup
            self._wanted = {number: '' if cgroup == home else cgroup for number, cgroup in self._wanted.items()}

    def note(self, step: RestartStep) -> None:
        """Write down a step that another process takes, before it or, for a segment, whose id is unknown before, after
        it."""
        self._entry.add(step)

    def keep_content(self) -> tuple[str, int]:
        """Make an empty file in the spool for content that is about to be overwritten elsewhere. Return its path and
        fd. SpoolFailed."""
        path = Path(self._job.request.spool) / f'{KEPT}{secrets.token_hex(8)}'
        self.note(MakeFile(str(path), 0, 0, os.geteuid(), os.getegid(), ()))
        with spooling(path):
            return str(path), os.open(path, _NEW, 0o600)

    def _exists(self, cgroup: str) -> bool:
        try:
            return self._context.cgroup(cgroup).exists
        except FileNotFoundError:
            return False

    def _take(self, step: AnyStep) -> None:
        fault(f'place-{step.point}')
        self._entry.add(step)
        step.take(self._context)
        fault(f'place-{step.point}-done')

    # ------------------------------------------------------------ before the start

    def settle(self, pids: Mapping[int, int]) -> None:
        """Record the final cgroup of each process and raise the barrier, when all processes exist. pids: by the numbers
        of `want`."""
        missing = [number for number in pids if self._wanted.get(number) and not self._exists(self._wanted[number])]
        if (missing or self._slice is not None) and self._job.request.systemd:
            self._scope(list(pids.values()))
        if not self._barrier:
            return
        self._take(FreezeCgroup(self._barrier))
        if self._barrier.endswith(self._entry.work_name):
            # Undone before the freeze is. So each process starts as it is moved home and is not frozen again, which
            # some calls answer with EINTR (signal(7)).
            self._take(Move(self._barrier, tuple(
                Moved(pid, read_stat(pid).start_time, self._wanted[number] or self._outside())
                for number, pid in pids.items())))

    def _outside(self) -> str:
        return str(PurePosixPath(self._barrier).parent)

    def _scope(self, pids: Sequence[int]) -> None:
        """Let systemd make a scope and move processes into it. Their former unit no longer exists."""
        name = f'ckptd-{self._job.request.image}-{secrets.token_hex(2)}.scope'
        self._job.channel.scope(name, pids, self._slice or '')
        self._barrier = read_cgroup2(pids[0])
        for number, step in self._entry.standing():
            if isinstance(step, Born):          # the cgroup is empty now
                self._entry.undone(number)
        self._entry.add(Born(self._barrier))

    def lift_barrier(self) -> None:
        """Lift the barrier after all tasks have been released. From here on they live, and each is moved to its
        cgroup."""
        # with these lines the tree is alive, and the objects made for it stay
        self._entry.keep(Lifetime.TREE)
        fault('place-alive')
        self._undo()

    def _undo(self) -> None:
        """Undo our standing steps."""
        if self._entry.undo(self._context, fault):
            # A first obstacle may be gone now. What remains in the journal is left to the next recovery.
            for sentence in self._entry.undo(self._context, fault):
                self._warn(sentence, 'EBUSY')
        self._entry.close()

    def _warn(self, sentence: str, errno_name: str) -> None:
        self.warnings.append(_warning(sentence, errno_name))


class BrokeredCgroup:
    """The cgroups of a restart by an ordinary user. The broker does the work (worker/broker/placement.py), and the tree
    is born in the cgroup of the worker."""

    def __init__(self, broker: BrokerClient) -> None:
        self._broker = broker
        self.cgroup_fd = -1
        self._wanted: dict[int, str] = {}
        self.warnings: list[Finding] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: when the worker has ended, the broker undoes what is not alive."""

    def want(self, cgroups: Mapping[int, str]) -> None:
        self._wanted = dict(cgroups)

    def prepare(self) -> None:
        """Do nothing: the broker makes its cgroup when the tree is ready."""

    def note(self, step: RestartStep) -> None:
        self._broker.note(step)

    def keep_content(self) -> tuple[str, int]:
        return self._broker.keep_content()

    def settle(self, pids: Mapping[int, int]) -> None:
        fault('place-settle')
        self._broker.place_tree([Placed(pid, self._wanted.get(number, '')) for number, pid in pids.items()])

    def lift_barrier(self) -> None:
        self.warnings += [_warning(sentence, 'EBUSY') for sentence in self._broker.start_tree()]


def place_for(job: JobContext[RestoreRequest]) -> Placement:
    """Make the cgroup placement for a restart."""
    return BrokeredCgroup(BrokerClient(job.channel)) if job.request.brokered else BirthCgroup(job)


def _warning(sentence: str, errno_name: str) -> Finding:
    return Finding(0, '', 'cgroup', errno_name, sentence, 'see the log of ckptd', 'warning')


def cgroups(processes: Sequence[NewProcess]) -> dict[int, str]:
    """Return the former cgroup of each living process, by vpid."""
    return {process.vpid: process.ids.cgroup for process in processes if process.alive}

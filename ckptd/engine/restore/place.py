# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cgroups of a restored tree: where it is born, and where it lives.

    born in     HOME/ckptd-JOB-RANDOM, a cgroup of its own, where one can be made
    starts      frozen there: each task is let go of, and only then, in one write, all of them
    lives in    the cgroup that was asked for, else the one that each process was in; a unit that is not loaded any more
                is a scope made by systemd, and without systemd a missing cgroup is made again

The journal has each step: as long as the line that says "it is alive" is not written, whoever recovers ends the tree,
and after it brings it home. So all of it runs in the end, or nothing.
"""

import errno
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from ckptd.engine.faults import fault
from ckptd.engine.job import Job
from ckptd.engine.messages import Caller
from ckptd.engine.restore.family import Process
from ckptd.engine.restore.puppet import Puppet
from ckptd.errors import CkptError, Refusal
from ckptd.journal.entry import Entry
from ckptd.journal.hands import Hands, undo_all
from ckptd.journal.steps import (
    AnyStep,
    Born,
    FreezeCgroup,
    KeepFile,
    MakeCgroup,
    MakeFile,
    MakeHome,
    MakeSegment,
    Move,
    Moved,
)
from ckptd.journal.store import Journal
from ckptd.kernel.cgroup import mount_of
from ckptd.kernel.mountinfo import read_mountinfo
from ckptd.kernel.pidfd import held
from ckptd.kernel.stat import read_stat
from ckptd.kernel.task import read_cgroup2

# where an ordinary user may make none, or nobody
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Birthplace:
    """One restart's cgroups and its journal entry. `with`: on failure everything is undone.

    wanted: the cgroup of each living process by vpid, '' where there was none. cgroup_fd: where to be born, -1: where
    we are.
    """

    def __init__(self, job: Job, wanted: Mapping[int, str]) -> None:
        self._job = job
        self._hands = Hands(mount_of(read_mountinfo()))
        asked = job.request.cgroup
        self._wanted = {vpid: asked or cgroup for vpid, cgroup in wanted.items()}
        self._entry: Entry = Journal(Path(job.request.runtime)).begin(job.request.job, f'image {job.request.image}',
                                                                      'restore')
        self._gate = ''             # the cgroup that all are in when they start
        self.cgroup_fd = -1
        self.warnings: list[Refusal] = []

    def __enter__(self) -> 'Birthplace':
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.cgroup_fd >= 0:
            os.close(self.cgroup_fd)
            self.cgroup_fd = -1
        if not self._entry.closed:
            self._undo()

    # ------------------------------------------------------------ before the birth

    def prepare(self) -> None:
        """Make the cgroup to be born in. Where there can be none, the tree is born and starts without."""
        with suppress(FileNotFoundError):
            for home in sorted(set(self._wanted.values()) - {''}):
                if not self._exists(home) and not self._job.request.systemd:
                    self._take(MakeHome(home))
        base = next((home for home in self._wanted.values() if home and self._exists(home)), '')
        base = base or read_cgroup2(os.getpid())
        if not base or '/..' in base:
            return
        work = str(PurePosixPath(base) / self._entry.work_name)
        try:
            self._take(MakeCgroup(work))
            self.cgroup_fd = os.open(self._hands.cgroup(work).path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if self._job.request.cgroup:
                raise CkptError(f'cgroup {base} takes no tree: {error.strerror}', errno=error.errno, resource=base,
                                phase='open', hint='name one that may be written with --cgroup') from error
            return
        self._gate = work
        self._entry.add(Born(work))

    def note(self, step: MakeSegment | MakeFile | KeepFile) -> None:
        """Write a step down that somebody else takes, before or, of a segment, whose number nobody knows, after it."""
        self._entry.add(step)

    def _exists(self, cgroup: str) -> bool:
        try:
            return self._hands.cgroup(cgroup).exists
        except FileNotFoundError:
            return False

    def _take(self, step: AnyStep) -> None:
        fault(f'place-{step.point}')
        self._entry.add(step)
        self._hands.take(step)
        fault(f'place-{step.point}-done')

    # ------------------------------------------------------------ before the start

    def settle(self, puppets: Mapping[int, Puppet]) -> None:
        """All processes are there: say where each belongs, and close the gate. puppets: one of each process by vpid."""
        missing = [vpid for vpid in puppets if self._wanted.get(vpid) and not self._exists(self._wanted[vpid])]
        if missing and self._job.request.systemd:
            self._scope(puppets)
        if not self._gate:
            return
        self._take(FreezeCgroup(self._gate))
        if self._gate.endswith(self._entry.work_name):
            # undone before the freeze is, so each starts as it comes home and is not frozen again: some calls answer
            # that with EINTR (signal(7))
            self._take(Move(self._gate, tuple(
                Moved(puppet.tid, read_stat(puppet.tid).start_time, self._wanted[vpid] or self._outside())
                for vpid, puppet in puppets.items())))

    def _outside(self) -> str:
        return str(PurePosixPath(self._gate).parent)

    def _scope(self, puppets: Mapping[int, Puppet]) -> None:
        """systemd makes a scope and moves them there: what was a unit of its is none any more."""
        name = f'ckptd-{self._job.request.image}-{secrets.token_hex(2)}.scope'
        self._job.channel.scope(name, [puppet.tid for puppet in puppets.values()])
        self._gate = read_cgroup2(next(iter(puppets.values())).tid)
        for number, step in self._entry.standing():
            if isinstance(step, Born):          # nobody is there any more
                self._entry.undone(number)
        self._entry.add(Born(self._gate))

    def open_gate(self) -> None:
        """All tasks have been let go of. From here on they live: the gate opens, and each goes where it belongs."""
        # with these lines the tree is alive, and what was made for it stays
        self._entry.undone(*(number for number, step in self._entry.standing() if _lasts(step)))
        fault('place-alive')
        self._undo()

    def _undo(self) -> None:
        """What of our steps still stands."""
        if undo_all(self._entry, self._hands, fault):
            # what was in the way once may be gone; what remains in the journal is left to the next recovery
            for sentence in undo_all(self._entry, self._hands, fault):
                self._warn(sentence, 'EBUSY')
        self._entry.close()

    def _warn(self, sentence: str, errno_name: str) -> None:
        self.warnings.append(Refusal(0, '', 'cgroup', errno_name, sentence, 'see the log of ckptd', 'warning'))


def homes(caller: Caller, imported: bool, processes: Sequence[Process]) -> dict[int, str]:
    """The cgroup that each living process was in, by vpid; of an image that an ordinary user has brought from outside,
    his own, whatever it says. ProcessLookupError when he is gone."""
    if imported and caller.uid:
        with held(caller.pid, caller.start_time, caller.uid):
            own = read_cgroup2(caller.pid)
        return {process.vpid: own for process in processes if process.alive}
    return {process.vpid: process.ids.cgroup for process in processes if process.alive}


def _lasts(step: AnyStep) -> bool:
    """What is not undone for a tree that lives. A file that only the journal knows by name has done its service."""
    if isinstance(step, MakeFile):
        return step.inode != 0
    return isinstance(step, Born | MakeHome | MakeSegment | KeepFile)

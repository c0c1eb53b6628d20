# SPDX-License-Identifier: LGPL-2.1-or-later
"""A step of the journal: a change to the system, written down before it is made."""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Annotated, ClassVar

import msgspec

from ckptd.kernel.cgroup import Cgroup, CgroupMount

# no '.' or '..' in a path; and cgroups that are emptied and removed must have a name that only a freeze gives
_NO_DOTS = r'\A(?!.*/\.{1,2}(/|\Z))'
CgroupName = Annotated[str, msgspec.Meta(pattern=_NO_DOTS + r'/[^\0\n]*\Z', max_length=4096)]
WorkName = Annotated[str, msgspec.Meta(pattern=_NO_DOTS + r'/([^\0\n]*/)?ckptd-[0-9]+-[0-9a-f]+\Z', max_length=4096)]
UnitName = Annotated[str, msgspec.Meta(pattern=r'\A[^\0\n/]+\Z', max_length=255)]
Pid = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]                # PID_MAX_LIMIT of <linux/threads.h>
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Path = Annotated[str, msgspec.Meta(pattern=r'\A/[^\0]*\Z', max_length=4096)]

UnitCall = Callable[[str], None]

EMPTY_SECONDS = 5.0         # time for a killed process to end and to leave its cgroup
_GONE = (errno.ENOENT, errno.ENODEV)


class Lifetime(Enum):
    """The time that a step stands if the job succeeds. If the job fails, its steps are undone in any case."""
    JOB = 'job'             # undone before the job ends
    TREE = 'tree'           # not undone any more when the restored tree lives
    IMAGE = 'image'         # not undone while the image exists; its restart or its removal does the rest


@dataclass(frozen=True, slots=True)
class StepContext:
    """Access to cgroups and systemd for steps.

    mount: of cgroup v2, None if there is none. freeze_unit, thaw_unit: ask systemd, None if there is none; OSError or
    CkptError if it fails.
    """
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


class Moved(msgspec.Struct, array_like=True, frozen=True):
    """A process, identified by its start time, and the cgroup that it was found in."""
    pid: Pid
    start_time: Count
    cgroup: CgroupName


class Step(msgspec.Struct, tag=True, frozen=True):
    """A change to the system, with the means to make it and to undo it.

    A subclass is a line of the journal: its name is the `type` there, its fields are the others. It defines `describe`
    and `_undo`; `take` only if the record is sufficient for it.
    """
    point: ClassVar[str] = ''               # its name among the fault points
    by_user: ClassVar[bool] = False         # undone with the rights of a user, in a process of one thread
    ends_tree: ClassVar[bool] = False       # the undo ends the tree, and comes before all others
    stops_tree: ClassVar[bool] = False      # keeps the tree from running
    before_thaw: ClassVar[bool] = False     # a recovery undoes it before the tree runs

    @property
    def lifetime(self) -> Lifetime:
        return Lifetime.JOB

    @property
    def makes(self) -> str:
        """Path of a file that it makes, '' if it makes none."""
        return ''

    @property
    def needs(self) -> tuple[str, ...]:
        """Paths of files that the undo needs. They stay until it has succeeded."""
        return ()

    def describe(self) -> str:
        """Describe it for people: 'freezing cgroup /a'."""
        raise NotImplementedError

    def take(self, context: StepContext) -> None:
        """Make the change. Processes that died meanwhile are skipped. OSError for other failures.

        Do nothing here if the record is not sufficient: then the code that writes the step down makes the change.
        """

    def undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        """Undo the change, even if it was not made, or was undone before. OSError, CkptError.

        origins: `JournalEntry.origins`.
        """
        try:
            self._undo(context, origins)
        except OSError as error:
            if error.errno not in _GONE:    # a cgroup that was removed keeps nothing frozen
                raise

    def _undo(self, context: StepContext, origins: Mapping[int, Moved]) -> None:
        raise NotImplementedError

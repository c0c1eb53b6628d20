# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lines of a journal entry: who began a freeze, and each change to the system that it made."""

from typing import Annotated, ClassVar

import msgspec

VERSION = 1
WORK_PREFIX = 'ckptd-'
# no '.' or '..' on the way, and for what may be emptied and removed: a name that only a freeze gives
_NO_DOTS = r'\A(?!.*/\.{1,2}(/|\Z))'
CgroupName = Annotated[str, msgspec.Meta(pattern=_NO_DOTS + r'/[^\0\n]*\Z', max_length=4096)]
WorkName = Annotated[str, msgspec.Meta(pattern=_NO_DOTS + r'/([^\0\n]*/)?ckptd-[0-9]+-[0-9a-f]+\Z', max_length=4096)]
UnitName = Annotated[str, msgspec.Meta(pattern=r'\A[^\0\n/]+\Z', max_length=255)]
Pid = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]                # PID_MAX_LIMIT of <linux/threads.h>
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Path = Annotated[str, msgspec.Meta(pattern=r'\A/[^\0]*\Z', max_length=4096)]


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The first line: whose freeze this is. boot: pids and cgroups of an earlier boot mean nothing."""
    version: Count
    boot: Annotated[str, msgspec.Meta(max_length=64)]
    job: Count
    target: Annotated[str, msgspec.Meta(max_length=4096)]
    mode: Annotated[str, msgspec.Meta(max_length=16)]


class Step(msgspec.Struct, tag=True, frozen=True):
    """A change to the system. point: its name among the fault points."""
    point: ClassVar[str] = ''


class MakeCgroup(Step, frozen=True):
    """A new cgroup for the time of the freeze."""
    point = 'make'
    cgroup: WorkName


class FreezeCgroup(Step, frozen=True):
    """1 to the cgroup.freeze of a cgroup that had 0 there."""
    point = 'freeze'
    cgroup: CgroupName


class Moved(msgspec.Struct, array_like=True, frozen=True):
    """A process, known by its start time, and the cgroup that it was found in."""
    pid: Pid
    start_time: Count
    cgroup: CgroupName


class Move(Step, frozen=True):
    """Processes to a cgroup of our own."""
    point = 'move'
    to: WorkName
    processes: tuple[Moved, ...]


class FreezeUnit(Step, frozen=True):
    """FreezeUnit of a unit that was found running."""
    point = 'freeze-unit'
    unit: UnitName


class ThawUnit(Step, frozen=True):
    """ThawUnit of a unit that was found frozen: undone by freezing it again."""
    point = 'thaw-unit'
    unit: UnitName


class MakeHome(Step, frozen=True):
    """A new cgroup, with those above it that were missing too, for a restored tree to stay in."""
    point = 'make-home'
    cgroup: CgroupName


class Born(Step, frozen=True):
    """A tree that is restored in this cgroup, and is nothing yet: undone by ending it."""
    point = 'born'
    cgroup: CgroupName


class MakeSegment(Step, frozen=True):
    """A System V segment for a tree that is restored, made by the rights of a user: undone by removing it, while it has
    this key and size and was made by this user."""
    point = 'make-segment'
    shmid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    key: Count
    size: Count
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()


class MakeFile(Step, frozen=True):
    """A new file, made by the rights of a user: undone by unlinking it. inode: 0 for a name that only we can have
    given; else the file is unlinked only while it is that one."""
    point = 'make-file'
    path: Path
    device: Count
    inode: Count
    uid: Count
    gid: Count
    groups: tuple[Count, ...]


class KeepFile(Step, frozen=True):
    """A file that is about to be written to, by the rights of a user. Its bytes from `start` on are in the file `kept`:
    undone by putting them back. mtime: nanoseconds."""
    point = 'keep-file'
    path: Path
    device: Count
    inode: Count
    size: Count
    mtime: Count
    start: Count
    kept: Path
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()


class Known(msgspec.Struct, array_like=True, frozen=True):
    """A process, identified by pid and start time."""
    pid: Pid
    start_time: Count


class EndProcesses(Step, frozen=True):
    """All processes of a tree that is being ended, as its image is published: undone by ending those that are left."""
    point = 'end'
    processes: tuple[Known, ...]


class Undone(msgspec.Struct, tag=True, frozen=True):
    """Step number `step` (0 is the first one after Begin) was undone out of turn."""
    step: Count


class Redone(msgspec.Struct, tag=True, frozen=True):
    """Step number `step` is about to be taken once more. It keeps its place: what came after is undone before it."""
    step: Count


AnyStep = (MakeCgroup | FreezeCgroup | Move | FreezeUnit | ThawUnit | MakeHome | Born | MakeSegment | MakeFile
           | KeepFile | EndProcesses)

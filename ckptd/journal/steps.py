# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lines of a journal entry: the start of a freeze, and each change to the system that it made."""

from typing import Annotated, ClassVar

import msgspec

VERSION = 1
WORK_PREFIX = 'ckptd-'
# no '.' or '..' in a path; and cgroups that are emptied and removed must have a name that only a freeze gives
_NO_DOTS = r'\A(?!.*/\.{1,2}(/|\Z))'
CgroupName = Annotated[str, msgspec.Meta(pattern=_NO_DOTS + r'/[^\0\n]*\Z', max_length=4096)]
WorkName = Annotated[str, msgspec.Meta(pattern=_NO_DOTS + r'/([^\0\n]*/)?ckptd-[0-9]+-[0-9a-f]+\Z', max_length=4096)]
UnitName = Annotated[str, msgspec.Meta(pattern=r'\A[^\0\n/]+\Z', max_length=255)]
Pid = Annotated[int, msgspec.Meta(ge=1, le=1 << 22)]                # PID_MAX_LIMIT of <linux/threads.h>
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Path = Annotated[str, msgspec.Meta(pattern=r'\A/[^\0]*\Z', max_length=4096)]


class Begin(msgspec.Struct, tag=True, frozen=True):
    """The first line of an entry. boot: pids and cgroups of an earlier boot are meaningless."""
    version: Count
    boot: Annotated[str, msgspec.Meta(max_length=64)]
    job: Count
    target: Annotated[str, msgspec.Meta(max_length=4096)]
    mode: Annotated[str, msgspec.Meta(max_length=16)]


class Step(msgspec.Struct, tag=True, frozen=True):
    """A change to the system. point: its name among the fault points."""
    point: ClassVar[str] = ''


class MakeCgroup(Step, frozen=True):
    """Make a cgroup for the time of the freeze."""
    point = 'make'
    cgroup: WorkName


class FreezeCgroup(Step, frozen=True):
    """Write 1 to the cgroup.freeze of a cgroup that had 0 there."""
    point = 'freeze'
    cgroup: CgroupName


class Moved(msgspec.Struct, array_like=True, frozen=True):
    """A process, identified by its start time, and the cgroup that it was found in."""
    pid: Pid
    start_time: Count
    cgroup: CgroupName


class Move(Step, frozen=True):
    """Move processes to a cgroup made by the freeze."""
    point = 'move'
    to: WorkName
    processes: tuple[Moved, ...]


class FreezeUnit(Step, frozen=True):
    """Call FreezeUnit for a unit that was found running."""
    point = 'freeze-unit'
    unit: UnitName


class ThawUnit(Step, frozen=True):
    """Call ThawUnit for a unit that was found frozen. It is undone by freezing the unit again."""
    point = 'thaw-unit'
    unit: UnitName


class MakeHome(Step, frozen=True):
    """Make a cgroup, and the missing ones above it, in which a restored tree stays."""
    point = 'make-home'
    cgroup: CgroupName


class Born(Step, frozen=True):
    """Restore a tree in this cgroup. The step is undone by ending the tree, as long as it does not live yet."""
    point = 'born'
    cgroup: CgroupName


class MakeSegment(Step, frozen=True):
    """Make a System V segment for a restored tree, with the rights of a user. It is undone by removing it, as long as
    it has this key and size and was made by this user."""
    point = 'make-segment'
    shmid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    key: Count
    size: Count
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()


class MakeFile(Step, frozen=True):
    """Make a file with the rights of a user. It is undone by unlinking it."""
    point = 'make-file'
    path: Path
    device: Count
    inode: Count    # unlink the file only while it has this inode; 0 for a name that only ckptd can have given
    uid: Count
    gid: Count
    groups: tuple[Count, ...]


class KeepFile(Step, frozen=True):
    """Write to an existing file with the rights of a user. Its bytes from `start` on are in the file `kept`, and the
    step is undone by putting them back."""
    point = 'keep-file'
    path: Path
    device: Count
    inode: Count
    size: Count
    mtime: Count    # nanoseconds
    start: Count
    kept: Path
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()


class LinkFile(Step, frozen=True):
    """A name that a checkpoint gives to a deleted file with the rights of a user.

    The undo unlinks the name if it still is that file. If the directory `image` of the image that needs the name
    exists, the name stays.
    """
    point = 'link-file'
    path: Path
    device: Count
    inode: Count
    image: Path
    uid: Count
    gid: Count
    groups: tuple[Count, ...]


class Known(msgspec.Struct, array_like=True, frozen=True):
    """A process, identified by pid and start time."""
    pid: Pid
    start_time: Count


class HeldSocket(msgspec.Struct, array_like=True, frozen=True):
    """A socket, identified by an fd of a process."""
    pid: Pid
    start_time: Count
    fd: Count


class PeekOffset(msgspec.Struct, array_like=True, frozen=True):
    """SO_PEEK_OFF of the socket with this inode."""
    inode: Count
    offset: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]


class WalkQueues(Step, frozen=True):
    """Receive queues of sockets that are walked with SO_PEEK_OFF. Undo: set the old offsets again.

    A socket that waits in the queue of another one is found through that one.
    """
    point = 'walk'
    holders: tuple[HeldSocket, ...]
    offsets: tuple[PeekOffset, ...]
    uid: Count = 0
    gid: Count = 0
    groups: tuple[Count, ...] = ()


class EndProcesses(Step, frozen=True):
    """End all processes of a tree whose image is published. The step is undone by ending those that are left."""
    point = 'end'
    processes: tuple[Known, ...]


class Undone(msgspec.Struct, tag=True, frozen=True):
    """Step number `step` (0 is the first one after Begin) was undone out of order."""
    step: Count


class Redone(msgspec.Struct, tag=True, frozen=True):
    """Step number `step` is about to be taken again. It keeps its place: later steps are undone before it."""
    step: Count


AnyStep = (MakeCgroup | FreezeCgroup | Move | FreezeUnit | ThawUnit | MakeHome | Born | MakeSegment | MakeFile
           | KeepFile | LinkFile | EndProcesses | WalkQueues)
